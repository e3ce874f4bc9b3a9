"""What sequences are padded to where a step is a CUDA graph, which has fixed shapes."""

from __future__ import annotations

from lora_fsdp.compute.attention import BLOCKS_FROM_TOKENS
from lora_fsdp.data.packing import SequenceSize

#: Sequences longer than this are not captured: their kernels take longer than their launches.
CAPTURE_UP_TO_TOKENS = 4096


def captured_size(size: SequenceSize) -> SequenceSize | None:
    """The size that a sequence is padded to, or `None` if it is too long."""
    if size.tokens > CAPTURE_UP_TO_TOKENS:
        return None
    return SequenceSize(
        tokens=padded_tokens(size.tokens),
        labels=padded_labels(size.labels),
        # A dense mask serves both kinds.
        is_one_sequence=size.is_one_sequence and size.tokens >= BLOCKS_FROM_TOKENS,
    )


def padded_tokens(tokens: int) -> int:
    """Of a sequence: few sizes, and little padding."""
    return _round_up(tokens, _unit(tokens))


def next_smaller(tokens: int) -> int:
    """The size of sequences that are just too short for the size of `tokens`."""
    padded = padded_tokens(tokens)
    return padded - _unit(padded)


def padded_labels(labels: int) -> int:
    """Of a sequence's labels."""
    return _round_up(max(labels, 1), 32 if labels <= 256 else 256)


def _unit(tokens: int) -> int:
    return 32 if tokens <= 512 else 128 if tokens <= 1024 else 256


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
