"""The Triton kernel that turns 4-bit weights into numbers.

Triton comes with torch's CUDA builds; this module is imported on a GPU only
(`lora_fsdp.base.four_bit`).
"""

# Kernels are written in Triton's own dialect.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Values that share a scale, and how many of their scales a program takes.
_NF4_BLOCK = 64
_NF4_BLOCKS = 64
# Weights of one launch: queries', keys' and values'.
_NF4_WEIGHTS = 3


class Nf4(NamedTuple):
    """A weight in 4 bits with doubly quantised scales.

    Attributes:
        packed: uint8, two values each, the first in the upper half.
        scales: uint8, one for 64 numbers.
        scales_of_scales: float32, one for 256 scales.
        offset: float32, a single number that is added to each scale.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    scales_of_scales: torch.Tensor
    offset: torch.Tensor


def unpack_nf4(
    weights: Sequence[Nf4],
    result: torch.Tensor,
    *,
    values: torch.Tensor,
    scale_values: torch.Tensor,
) -> None:
    """Turn up to three weights into numbers, bit for bit as bitsandbytes.

    In one launch, as a kernel this short reaches the memory's bandwidth in its middle only.

    Args:
        weights: each a multiple of 64 numbers.
        result: the numbers of all, one weight after the other, contiguous.
        values: the 16 numbers that 4 bits stand for, float32.
        scale_values: the 256 numbers that a scale stands for, float32.
    """
    if not 1 <= len(weights) <= _NF4_WEIGHTS:
        raise ValueError(f"One launch takes 1 to {_NF4_WEIGHTS} weights, and not {len(weights)}.")
    counts = [weight.packed.numel() * 2 // _NF4_BLOCK for weight in weights]
    programs = [triton.cdiv(count, _NF4_BLOCKS) for count in counts]
    none = _NF4_WEIGHTS - len(weights)
    _unpack_nf4[(sum(programs),)](
        *(part for weight in (*weights, *[weights[0]] * none) for part in weight),
        *(*counts, *[0] * none),
        *(*programs, *[0] * none)[:-1],
        result,
        values,
        scale_values,
        BLOCKS=_NF4_BLOCKS,
        BYTES=_NF4_BLOCK // 2,
        # Gathered weights may begin anywhere.
        ALIGNMENT=min(
            16, *(weight.packed.data_ptr() & -weight.packed.data_ptr() for weight in weights)
        ),
        # A fused multiply and add would round the scales otherwise than bitsandbytes does.
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["blocks_0", "blocks_1", "blocks_2", "programs_0", "programs_1"])
def _unpack_nf4(
    packed_0, scales_0, scales_of_scales_0, offset_0,
    packed_1, scales_1, scales_of_scales_1, offset_1,
    packed_2, scales_2, scales_of_scales_2, offset_2,
    blocks_0, blocks_1, blocks_2,
    programs_0, programs_1,
    result,
    values,
    scale_values,
    BLOCKS: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    packed, scales, scales_of_scales, offset = packed_0, scales_0, scales_of_scales_0, offset_0
    blocks, before = blocks_0, program * 0
    if program >= programs_0 + programs_1:
        packed, scales, scales_of_scales, offset = packed_2, scales_2, scales_of_scales_2, offset_2
        blocks, before = blocks_2, blocks_0 + blocks_1
        program -= programs_0 + programs_1
    elif program >= programs_0:
        packed, scales, scales_of_scales, offset = packed_1, scales_1, scales_of_scales_1, offset_1
        blocks, before = blocks_1, blocks_0
        program -= programs_0
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    scale = tl.load(scale_values + tl.load(scales + block, inside, 0).to(tl.int32))
    scale = scale * tl.load(scales_of_scales + block // 256, inside, 0.0) + tl.load(offset)
    first = block.to(tl.int64)[:, None] * BYTES
    # What the compiler knows of the arguments' addresses is lost in the branches.
    at = tl.multiple_of(packed, ALIGNMENT) + first + tl.arange(0, BYTES)[None, :]
    byte = tl.load(at, inside[:, None], 0).to(tl.int32)
    upper = tl.load(values + (byte >> 4)) * scale[:, None]
    lower = tl.load(values + (byte & 15)) * scale[:, None]
    numbers = tl.interleave(upper, lower)
    to = 2 * (first + before * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(result + to, numbers.to(result.dtype.element_ty), inside[:, None])
