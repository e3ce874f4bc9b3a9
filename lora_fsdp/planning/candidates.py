"""The ways in which a base can lie on given GPUs, each with its memory and its time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_fsdp.data.workload import Work
from lora_fsdp.placement.gpus import Gpu
from lora_fsdp.placement.memory import (
    LONGEST_SEQUENCE,
    USUAL_SEQUENCE,
    DeviceMemory,
    LargestSequence,
    Placement,
    can_capture,
    device_memory,
    largest_sequence,
    layers_that_fit,
    with_head_placed,
)
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.placement.timing import run_seconds

#: Of a GPU's memory, what a run may plan with: the allocator cannot fill every gap.
USABLE = 0.97


@dataclass(frozen=True)
class Candidate:
    """One strategy on one choice of GPUs.

    Attributes:
        gpu, count: which GPUs, one rank each.
        strategy: its name.
        placement: how the base lies.
        rows: the largest row.
        memory: bytes on each GPU.
        seconds: of training and scoring, loading not counted.
        cost: in the price's currency; `None` without a price.
        sequences_are_short: whether a step's tokens need several rows for lack of memory.
        base_bytes: of the whole base.
    """

    gpu: Gpu
    count: int
    strategy: str
    placement: Placement
    rows: LargestSequence
    memory: DeviceMemory
    seconds: float
    cost: float | None
    sequences_are_short: bool
    base_bytes: int

    @property
    def spare(self) -> int:
        """Bytes left of what can be used; less than 0 = it does not fit."""
        return int(self.gpu.memory * USABLE) - self.memory.total

    @property
    def fits(self) -> bool:
        """Whether a step's peak fits the GPU."""
        return self.spare >= 0

    @property
    def host_bytes(self) -> int:
        """Host memory that offloaded shards take, all ranks together."""
        return self.base_bytes if self.placement.offloaded else 0


def candidates(
    shape: ModelShape,
    work: Work,
    gpu: Gpu,
    count: int,
    *,
    price_per_hour: float | None,
) -> list[Candidate]:
    """Every strategy on `count` GPUs, in bfloat16 and in 4 bits.

    Args:
        shape: of the base.
        work: what the run computes.
        gpu, count: the GPUs.
        price_per_hour: of one GPU; `None` = no cost.
    """
    found = []
    for quantized in (False, True):
        for name, placement in _placements(shape, work, gpu, count, quantized=quantized):
            tried = [
                _candidate(
                    name,
                    replace(
                        placement,
                        recomputed=again,
                        captured=can_capture(shape, recomputed=again),
                    ),
                    shape,
                    work,
                    gpu,
                )
                for again in (False, True)
            ]
            # Recomputing costs time: it is for what does not fit without.
            chosen = tried[0] if tried[0].fits or not tried[1].fits else tried[1]
            cost = None
            if price_per_hour is not None:
                cost = price_per_hour * count * chosen.seconds / 3600
            found.append(replace(chosen, cost=cost))
    return found


def _placements(
    shape: ModelShape, work: Work, gpu: Gpu, count: int, *, quantized: bool
) -> Iterator[tuple[str, Placement]]:
    """Strategies by name; those that share something need several ranks."""
    none = Placement(ranks=count, resident_layers=0, quantized=quantized)
    yield "resident", replace(none, resident_layers=shape.layers)
    if count > 1:
        rows = _usual_sequence(work)
        free = int(gpu.memory * USABLE) - device_memory(shape, none, rows).context
        layers = layers_that_fit(shape, none, rows, free=free)
        if 0 < layers < shape.layers:
            yield f"{layers} of {shape.layers} resident", replace(none, resident_layers=layers)
        yield "till backward", replace(none, kept_until_backward=True)
        yield "full shard", none
    yield "offload", replace(none, offloaded=True)


def _usual_sequence(work: Work) -> LargestSequence:
    """By which a run decides what stays (`lora_fsdp.training.place`)."""
    return largest_sequence(
        work, max(work.longest_example, work.max_tokens_per_row or USUAL_SEQUENCE)
    )


def _candidate(
    name: str, placement: Placement, shape: ModelShape, work: Work, gpu: Gpu
) -> Candidate:
    """With the longest rows that fit, as the run will choose them."""
    shorter = (USUAL_SEQUENCE >> halvings for halvings in range(USUAL_SEQUENCE.bit_length()))
    placement = with_head_placed(shape, placement, _usual_sequence(work))
    for longest in (work.max_tokens_per_row or LONGEST_SEQUENCE, *shorter):
        rows = largest_sequence(work, max(longest, work.longest_example))
        made = Candidate(
            gpu=gpu,
            count=placement.ranks,
            strategy=name + (", recomputing" if placement.recomputed else ""),
            placement=placement,
            rows=rows,
            memory=device_memory(shape, placement, rows),
            seconds=run_seconds(shape, placement, work, gpu, sequence_tokens=rows.tokens),
            cost=None,
            base_bytes=shape.base_bytes(quantized=placement.quantized),
            sequences_are_short=rows.tokens < min(LONGEST_SEQUENCE, work.largest_step),
        )
        if made.fits:
            break
    return made
