"""The plan: which GPUs hold a run, how, how long it takes and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig
from transformers import PretrainedConfig

from lora_fsdp.data.workload import Work
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.counting import build_on_meta, shape_of
from lora_fsdp.placement.gpus import GPUS, Gpu, parse_gpus
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.planning.candidates import Candidate, candidates

_COUNTS = (1, 2, 4, 8, 16, 32, 64)
#: GPUs of one machine; more need several, whose network is not predicted.
_ONE_MACHINE = 8


@dataclass(frozen=True)
class Plan:
    """Strategies on the GPUs that were asked for.

    Attributes:
        model: its name.
        shape: its sizes, in bfloat16.
        work: what the run computes.
        candidates: every strategy, in the order of the GPUs asked for.
        notes: what to know about the numbers.
    """

    model: str
    shape: ModelShape
    work: Work
    candidates: Sequence[Candidate]
    notes: Sequence[str]

    @property
    def best(self) -> Candidate | None:
        """The fastest of those that fit."""
        fitting = [candidate for candidate in self.candidates if candidate.fits]
        return min(fitting, key=lambda candidate: candidate.seconds, default=None)

    def best_on(self, count: int, gpu: Gpu) -> Candidate | None:
        """The fastest that fits `count` of `gpu`."""
        here = [c for c in self.candidates if c.count == count and c.gpu is gpu and c.fits]
        return min(here, key=lambda candidate: candidate.seconds, default=None)


def make_plan(
    model: str,
    config: PretrainedConfig,
    *,
    adapter: LoraConfig,
    work: Work,
    gpus: Sequence[str],
    price_per_hour: float | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Work out every strategy; nothing is loaded and no GPU is needed.

    Args:
        model: its name, for the plan.
        config: its config.
        adapter: what is trained.
        work: what the run computes.
        gpus: such as `2xRTX4090` (`parse_gpus`).
        price_per_hour: of one GPU.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ArgumentError: an unknown GPU, or a price below 0.
        UnsupportedModelError, TargetModulesError: as `shape_of`.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise ArgumentError(f"--price_per_hour must be 0 or more, not {price_per_hour}.")
    chosen = [parse_gpus(text) for text in gpus]
    shape = shape_of(build_on_meta(config, trust_remote_code=trust_remote_code), adapter)
    found = [
        candidate
        for count, gpu in chosen
        for candidate in candidates(shape, work, gpu, count, price_per_hour=price_per_hour)
    ]
    notes = [shape.note] if shape.note else []
    if any(count > _ONE_MACHINE for count, _ in chosen):
        notes.append(
            f"more than {_ONE_MACHINE} GPUs are several machines: memory holds for them, time does "
            "not, as their network is not known"
        )
    for count, gpu in chosen:
        here = [c for c in found if c.fits and c.count == count and c.gpu == gpu]
        if not here:
            notes.append(_gpu_that_would(shape, work, count, gpu))
        elif all(_is_compromise(candidate) for candidate in here):
            notes.append(_count_that_would(shape, work, count, gpu))
    for bytes_ in sorted({one.host_bytes for one in found if one.fits and one.host_bytes}):
        notes.append(f"offload: {bytes_ / 1e9:.0f} GB of the machine's host memory hold the base")
    return Plan(model, shape, work, found, notes)


def _is_compromise(candidate: Candidate) -> bool:
    """Whether the base is rounded to 4 bits, or fetched from host memory at every step."""
    return candidate.placement.quantized or candidate.placement.offloaded


def _count_that_would(shape: ModelShape, work: Work, count: int, gpu: Gpu) -> str:
    """How many of these GPUs hold the base in bfloat16 by themselves."""
    for more in (n for n in _COUNTS if n > count):
        tried = candidates(shape, work, gpu, more, price_per_hour=None)
        if any(candidate.fits and not _is_compromise(candidate) for candidate in tried):
            return (
                f"{count} x {gpu.name} hold it only in 4 bits or by offload; {more} would in "
                "bfloat16"
            )
    return f"{count} x {gpu.name} hold it only in 4 bits or by offload, and so do {_COUNTS[-1]}"


def _gpu_that_would(shape: ModelShape, work: Work, count: int, gpu: Gpu) -> str:
    """The smallest GPU that holds it; more of the same do not, as offload needs one alone."""
    for larger in sorted(GPUS.values(), key=lambda known: known.memory):
        tried = candidates(shape, work, larger, count, price_per_hour=None)
        if any(candidate.fits for candidate in tried):
            return f"nothing fits {count} x {gpu.name}; {count} x {larger.name} would hold it"
    return f"nothing fits {count} x {gpu.name}, nor any GPU that is known here"
