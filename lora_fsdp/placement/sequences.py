"""How long packed sequences are, and the largest that a run will have."""

from __future__ import annotations

from lora_fsdp.data.workload import Work
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.layout import Layout
from lora_fsdp.placement.memory import LargestSequence, device_memory
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.shape import ModelShape

#: Longer sequences gain nothing: the matmuls are as fast as they get.
LONGEST_SEQUENCE = 8192
#: The length where no memory is known, and at most where layers are not fused: only fused layers
#: compute long sequences by blocks.
USUAL_SEQUENCE = 2048
_UNIT = 64


def check_sequence_length(asked: int | None, *, max_length: int) -> None:
    """Refuse packed sequences too short for an example.

    Args:
        asked: the longest packed sequence in tokens; `None` = by memory.
        max_length: of an example.

    Raises:
        ArgumentError: names both lengths.
    """
    if asked is not None and asked < max_length:
        raise ArgumentError(
            f"--max_tokens_per_row {asked} is less than --max_length {max_length}: a packed "
            "sequence must hold the longest example."
        )


def usual_length(work: Work, request: Request) -> int:
    """The length by which it is decided what of the base stays."""
    return max(work.longest_example, request.max_tokens_per_row or USUAL_SEQUENCE)


def sequence_length(
    shape: ModelShape, layout: Layout, work: Work, hardware: Hardware, request: Request
) -> int:
    """The longest packed sequence in tokens; it holds at least one example.

    What was asked for, or what half of the memory beside the base holds, or the usual length, if
    that fits at all.
    """
    if request.max_tokens_per_row is not None:
        return request.max_tokens_per_row
    usual, shortest = usual_length(work, request), work.longest_example
    if hardware.free is None:
        return usual
    largest = largest_sequence(work, usual)
    if device_memory(shape, layout, largest).allocated <= hardware.free:
        shortest = usual
    beside = device_memory(shape, layout, LargestSequence(tokens=1, labels=1)).allocated
    left = (hardware.free - beside) // 2
    length = LONGEST_SEQUENCE if shape.is_fused else USUAL_SEQUENCE
    while length > shortest and shape.saved_bytes(length, recomputed=layout.recomputed) > left:
        length -= _UNIT
    return max(length, shortest)


def largest_sequence(work: Work, longest: int) -> LargestSequence:
    """The largest where none is longer than `longest`; all a step's tokens, if they are fewer.

    Sequences that are scored are filled up to `longest`, or end with the held-out examples.
    """
    tokens = min(longest, work.largest_step)
    share = min(1.0, tokens / work.step_tokens)
    return LargestSequence(
        tokens=tokens,
        labels=max(1, round(work.step_labels * share)),
        scored=min(longest, round(work.scored_tokens / 2)),
    )
