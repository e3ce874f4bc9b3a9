"""Triton kernels of a decoder layer's elementwise parts, for frozen weights.

Each does in one pass over the activations what transformers does in several, rounds where it
rounds, and has no gradient for the weight, which is frozen. Triton comes with torch's CUDA builds;
this module is imported on a GPU only (`lora_fsdp.compute.fused_functions`).
"""

# Kernels are written in Triton's own dialect.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm over the last dimension of `hidden` [N, H], and the reciprocal RMS [N]."""
    vectors, width = hidden.shape
    normed = torch.empty_like(hidden)
    reciprocal = torch.empty(vectors, dtype=torch.float32, device=hidden.device)
    block = triton.next_power_of_2(width)
    _rms_norm_forward[(vectors,)](
        hidden, weight, normed, reciprocal, width, epsilon, BLOCK=block, num_warps=_warps(block)
    )
    return normed, reciprocal


def rms_norm_backward(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    reciprocal: torch.Tensor,
    also: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of `rms_norm` for `hidden` [N, H], plus `also` [N, H] if given."""
    vectors, width = hidden.shape
    result = torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    _rms_norm_backward[(vectors,)](
        gradient,
        hidden,
        weight,
        reciprocal,
        also if also is not None else gradient,
        result,
        width,
        ADD=also is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return result


def silu_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of `gate_up` [N, 2 I], [N, I]."""
    vectors, double = gate_up.shape
    result = gate_up.new_empty(vectors, double // 2)
    grid = (vectors, triton.cdiv(double // 2, _SILU_BLOCK))
    _silu_multiply_forward[grid](gate_up, result, double // 2, BLOCK=_SILU_BLOCK)
    return result


def silu_multiply_backward(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Gradient of `silu_multiply` for `gate_up`, [N, 2 I]."""
    vectors, double = gate_up.shape
    result = torch.empty_like(gate_up)
    grid = (vectors, triton.cdiv(double // 2, _SILU_BLOCK))
    _silu_multiply_backward[grid](gradient, gate_up, result, double // 2, BLOCK=_SILU_BLOCK)
    return result


def rotate(
    source: torch.Tensor,
    target: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    *,
    heads_rotated: int,
    backward: bool,
) -> None:
    """Rotary embedding of the first `heads_rotated` heads; the others are copied.

    Args:
        source, target: [heads, T, D], any strides but 1 in the last dimension.
        cosine, sine: [T, D], contiguous.
        heads_rotated: how many heads are rotated.
        backward: rotate back instead.
    """
    heads, tokens, width = source.shape
    block = 8
    _rotate[(tokens, triton.cdiv(heads, block))](
        source,
        source.stride(0),
        source.stride(1),
        target,
        target.stride(0),
        target.stride(1),
        cosine,
        sine,
        heads,
        heads_rotated,
        -1.0 if backward else 1.0,
        HALF=width // 2,
        HALF_BLOCK=triton.next_power_of_2(width // 2),
        HEADS=block,
    )


_SILU_BLOCK = 2048


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


@triton.jit
def _rms_norm_forward(hidden, weight, normed, reciprocal, width, epsilon, BLOCK: tl.constexpr):
    vector = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(hidden + vector * width + columns, inside, 0.0)
    scale = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    wide = x.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + epsilon)
    rounded = (wide * r).to(x.dtype).to(tl.float32)  # transformers rounds before the weight
    tl.store(normed + vector * width + columns, (scale * rounded).to(x.dtype), inside)
    tl.store(reciprocal + vector, r)


@triton.jit
def _rms_norm_backward(
    gradient,
    hidden,
    weight,
    reciprocal,
    also,
    result,
    width,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    vector = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = vector * width + columns
    x = tl.load(hidden + at, inside, 0.0)
    r = tl.load(reciprocal + vector)
    scale = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    g = tl.load(gradient + at, inside, 0.0).to(tl.float32) * scale
    unit = x.to(tl.float32) * r
    dx = r * (g - unit * (tl.sum(g * unit, 0) / width))
    if ADD:
        dx += tl.load(also + at, inside, 0.0).to(tl.float32)
    tl.store(result + at, dx.to(x.dtype), inside)


@triton.jit
def _silu_multiply_forward(gate_up, result, width, BLOCK: tl.constexpr):
    vector = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = gate_up + vector * width * 2 + columns
    gate = tl.load(at, inside, 0.0)
    up = tl.load(at + width, inside, 0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    activated = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(result + vector * width + columns, (activated * up).to(gate.dtype), inside)


@triton.jit
def _silu_multiply_backward(gradient, gate_up, result, width, BLOCK: tl.constexpr):
    vector = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = vector * width * 2 + columns
    gate = tl.load(gate_up + at, inside, 0.0)
    up = tl.load(gate_up + at + width, inside, 0.0).to(tl.float32)
    g = tl.load(gradient + vector * width + columns, inside, 0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    d_gate = g * up * sigmoid * (1.0 + wide * (1.0 - sigmoid))
    tl.store(result + at, d_gate.to(gate.dtype), inside)
    tl.store(result + at + width, (g * wide * sigmoid).to(gate.dtype), inside)


@triton.jit
def _rotate(
    source,
    source_head,
    source_token,
    target,
    target_head,
    target_token,
    cosine,
    sine,
    heads,
    heads_rotated,
    sign,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF_BLOCK)
    narrow = column < HALF
    inside = (head < heads)[:, None] & narrow[None, :]
    cos = tl.load(cosine + token * HALF * 2 + column, narrow, 1.0).to(tl.float32)[None, :]
    sin = tl.load(sine + token * HALF * 2 + column, narrow, 0.0).to(tl.float32)[None, :] * sign
    turned = (head < heads_rotated)[:, None]
    cos = tl.where(turned, cos, 1.0)
    sin = tl.where(turned, sin, 0.0)
    at = source + head.to(tl.int64)[:, None] * source_head + token * source_token + column[None, :]
    low = tl.load(at, inside, 0.0)
    high = tl.load(at + HALF, inside, 0.0).to(tl.float32)
    wide = low.to(tl.float32)
    to = target + head.to(tl.int64)[:, None] * target_head + token * target_token + column[None, :]
    tl.store(to, (wide * cos - high * sin).to(low.dtype), inside)
    tl.store(to + HALF, (high * cos + wide * sin).to(low.dtype), inside)
