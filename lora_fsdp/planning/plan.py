"""The plan: which GPUs hold a run, how, how long it takes and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.data.workload import Work
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.gpus import GPUS, Gpu, parse_cpu, parse_gpus
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.placement.whole_job import RENTED, Machine
from lora_fsdp.planning.candidates import Candidate, Question, candidates
from lora_fsdp.sizing.machine import cpu_here

_COUNTS = (1, 2, 4, 8, 16, 32, 64)
#: GPUs of one machine; more need several, whose network is not predicted.
_ONE_MACHINE = 8


@dataclass(frozen=True)
class Plan:
    """Strategies on the GPUs that were asked for.

    Attributes:
        model: its name.
        shape: its sizes.
        work: what the run computes on the first of the GPUs asked for.
        candidates: every strategy, in the order of the GPUs asked for.
        notes: what to know about the numbers.
        shipped: the accelerate YAMLs that have a name, by it.
        hosts: machines.
        link: bytes per second that each can send to others.
        machine: what the job's time depends on beside the GPUs.
    """

    model: str
    shape: ModelShape
    work: Work
    candidates: Sequence[Candidate]
    notes: Sequence[str]
    shipped: Mapping[str, FsdpSettings | None]
    hosts: int = 1
    link: float = math.inf
    machine: Machine = RENTED

    @property
    def best(self) -> Candidate | None:
        """The fastest of those that fit with a margin; without any such, of those that fit."""
        fitting = [candidate for candidate in self.candidates if candidate.fits]
        return min(
            fitting,
            key=lambda candidate: (not candidate.leaves_a_margin, candidate.seconds),
            default=None,
        )


def make_plan(
    question: Question,
    *,
    gpus: Sequence[str],
    price_per_hour: float | None = None,
    hosts: int = 1,
    link: float = math.inf,
) -> Plan:
    """Work out every strategy; nothing is loaded and no GPU is needed.

    Args:
        question: the run that is planned for.
        gpus: of each host, such as `2xRTX4090` (`parse_gpus`); or processes of this machine's CPU,
            which is measured: `2xCPU`.
        price_per_hour: of one GPU.
        hosts: machines.
        link: bytes per second that each can send to others.

    Raises:
        ArgumentError: an unknown GPU, a price below 0, or what was asked for cannot be.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise ArgumentError(f"--price_per_hour must be 0 or more, not {price_per_hour}.")
    shape = question.shape
    chosen = [(hosts * count, gpu) for count, gpu in (_parsed(text, question) for text in gpus)]
    found = [
        candidate
        for count, gpu in chosen
        for candidate in candidates(
            question, gpu, count, price_per_hour=price_per_hour, hosts=hosts, link=link
        )
    ]
    notes = [shape.note] if shape.note else []
    packing = question.request(chosen[0][0]).packing_choice
    if packing.packing.is_apart:
        notes.append(f"packing: {packing}")
    if any(count > hosts * _ONE_MACHINE for count, _ in chosen):
        notes.append(
            f"more than {_ONE_MACHINE} GPUs are several machines: memory holds for them, time does "
            "not, as their network is not known; say --hosts and --link"
        )
    for count, gpu in chosen if hosts == 1 else ():
        here = [c for c in found if c.fits and c.count == count and c.gpu == gpu]
        if not here:
            notes.append(_gpu_that_would(question, count, gpu))
        elif all(candidate.is_compromise for candidate in here):
            notes.append(_count_that_would(question, count, gpu))
    slower = {gpu.name for _, gpu in chosen if not gpu.has_bfloat16}
    if slower and question.dtype == "bfloat16":
        notes.append(
            f"{', '.join(sorted(slower))}: no bfloat16 arithmetic. Plan with --dtype float32, as "
            "there bfloat16 is emulated, many times slower than these times, or fails"
        )
    for bytes_ in sorted({one.host_bytes for one in found if one.fits and one.host_bytes}):
        notes.append(f"offload: {bytes_ / 1e9:.0f} GB of the machine's host memory hold the base")
    work = question.work(chosen[0][0])
    return Plan(
        question.model, shape, work, found, notes, question.shipped, hosts, link, question.machine
    )


def _parsed(text: str, question: Question) -> tuple[int, Gpu]:
    if (ranks := parse_cpu(text)) is None:
        return parse_gpus(text)
    tokens = question.work(ranks).step_tokens
    return ranks, cpu_here(question.shape, tokens=tokens, ranks=ranks)


def _count_that_would(question: Question, count: int, gpu: Gpu) -> str:
    """How many of these GPUs hold the base without a compromise."""
    for more in (n for n in _COUNTS if n > count):
        tried = candidates(question, gpu, more)
        if any(candidate.fits and not candidate.is_compromise for candidate in tried):
            return (
                f"{count} x {gpu.name} hold it only in 4 bits or by offload; {more} would in "
                f"{question.dtype}"
            )
    return f"{count} x {gpu.name} hold it only in 4 bits or by offload, and so do {_COUNTS[-1]}"


def _gpu_that_would(question: Question, count: int, gpu: Gpu) -> str:
    """The smallest GPU that holds it; more of the same do not, as offload needs one alone."""
    larger_ones = (known for known in GPUS.values() if known.memory > gpu.memory)
    for larger in sorted(larger_ones, key=lambda known: known.memory):
        if any(candidate.fits for candidate in candidates(question, larger, count)):
            return f"nothing fits {count} x {gpu.name}; {count} x {larger.name} would hold it"
    return f"nothing fits {count} x {gpu.name}, nor any GPU that is known here"
