"""A decoder layer's steps with their gradients, for frozen weights and a LoRA adapter.

Three things that autograd over transformers' and PEFT's modules does not know are used here: the
base is frozen (no gradient for its weights), the activations stay in the base's dtype (PEFT takes
them through float32 and back), and projections of one input are one matmul. Every gradient
is tested against the plain modules. On a GPU the elementwise parts are Triton kernels
(`lora_fsdp.compute.kernels`), elsewhere torch operations.
"""

# autograd.Function's forward and backward take what each function needs.
# mypy: disable-error-code="override, no-untyped-call, no-untyped-def, no-any-return"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function
from torch.nn import functional

if TYPE_CHECKING:
    from lora_fsdp.compute.projections import AdaptedProjection, Projections


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of `hidden` [N, H], and `hidden` itself.

    Use the second result for the residual connection: its gradient then joins the norm's in one
    kernel.
    """
    return _RmsNorm.apply(hidden, weight, epsilon)


def silu_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the joined projection [N, 2 I]: [N, I]."""
    return _SiluMultiply.apply(gate_up)


def split_and_rotate(
    projected: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    *,
    heads: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a joined projection, the first two with rotary positions.

    Args:
        projected: [T, (queries + keys + values) * D].
        cosine, sine: [T, D].
        heads: numbers of query, key and value heads.

    Returns:
        [1, heads, T, D] each.
    """
    return _SplitAndRotate.apply(projected, cosine, sine, heads)


def project(
    projections: Projections, inputs: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """All of `projections` of `inputs` [T, in] with their adapters, side by side.

    The adapters are taken from their copies (`Projections.copies`), which a forward of the model
    brings up to date (`decoder_layer.fuse_layers`).

    Returns:
        [T, sum of the output widths], plus `residual` (of that shape) if given.
    """
    return _Project.apply(projections, inputs, residual, *projections.adapters())


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, epsilon):
        if hidden.is_cuda:
            from lora_fsdp.compute import kernels

            normed, reciprocal = kernels.rms_norm(hidden, weight, epsilon)
        else:
            wide = hidden.float()
            reciprocal = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
            normed = weight * (wide * reciprocal).to(hidden.dtype)
        ctx.save_for_backward(hidden, weight, reciprocal)
        ctx.set_materialize_grads(False)  # head norms have no residual
        return normed, hidden

    @staticmethod
    def backward(ctx: Any, gradient, residual_gradient):
        hidden, weight, reciprocal = ctx.saved_tensors
        if hidden.is_cuda:
            from lora_fsdp.compute import kernels

            contiguous = gradient.contiguous()
            also = None if residual_gradient is None else residual_gradient.contiguous()
            result = kernels.rms_norm_backward(contiguous, hidden, weight, reciprocal, also)
            return result, None, None
        scaled = (gradient * weight).float()
        unit = hidden.float() * reciprocal
        wide = reciprocal * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
        result = wide.to(hidden.dtype)
        return result if residual_gradient is None else result + residual_gradient, None, None


class _SiluMultiply(Function):
    @staticmethod
    def forward(ctx: Any, gate_up):
        ctx.save_for_backward(gate_up)
        if gate_up.is_cuda:
            from lora_fsdp.compute import kernels

            return kernels.silu_multiply(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient):
        (gate_up,) = ctx.saved_tensors
        if gate_up.is_cuda:
            from lora_fsdp.compute import kernels

            return kernels.silu_multiply_backward(gradient.contiguous(), gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        activated = gate * sigmoid
        result = torch.empty_like(gate_up)
        d_gate, d_up = result.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=d_up)
        # silu'(x) = sigmoid(x) * (1 + x - silu(x))
        torch.mul(gradient * up, sigmoid * (1 + gate - activated), out=d_gate)
        return result


class _SplitAndRotate(Function):
    @staticmethod
    def forward(ctx: Any, projected, cosine, sine, heads):
        ctx.save_for_backward(cosine, sine)
        ctx.heads = heads
        tokens = projected.shape[0]
        by_token = projected.view(tokens, sum(heads), -1)
        by_head = by_token.transpose(0, 1)
        # Laid out by token, as attention's output then is too: it need not be transposed.
        result = torch.empty_like(by_token).transpose(0, 1)
        _rotate(by_head, result, cosine, sine, rotated=heads[0] + heads[1], backward=False)
        return tuple(part[None] for part in result.split(heads))

    @staticmethod
    def backward(ctx: Any, *gradients):
        cosine, sine = ctx.saved_tensors
        tokens, width = cosine.shape
        result = cosine.new_empty(tokens, sum(ctx.heads), width, dtype=gradients[0].dtype)
        parts = result.transpose(0, 1).split(ctx.heads)
        for index, (gradient, part) in enumerate(zip(gradients, parts, strict=True)):
            rotated = 0 if index == 2 else ctx.heads[index]
            _rotate(gradient[0], part, cosine, sine, rotated=rotated, backward=True)
        return result.view(tokens, -1), None, None, None


def _rotate(
    source: torch.Tensor,
    target: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    *,
    rotated: int,
    backward: bool,
) -> None:
    """As `kernels.rotate`."""
    if source.is_cuda:
        from lora_fsdp.compute import kernels

        source = source if source.stride(-1) == 1 else source.contiguous()
        kernels.rotate(source, target, cosine, sine, heads_rotated=rotated, backward=backward)
        return
    target[rotated:] = source[rotated:]
    if not rotated:
        return
    half = source.shape[-1] // 2
    low, high = source[:rotated, :, :half], source[:rotated, :, half:]
    cos, sin = cosine[:, :half], sine[:, :half]
    if backward:
        sin = -sin
    target[:rotated, :, :half] = low * cos - high * sin
    target[:rotated, :, half:] = high * cos + low * sin


class _Project(Function):
    """y = x W^T + sum of s_i drop_i(x) A_i^T B_i^T, the base's part as one matmul where joined."""

    @staticmethod
    def forward(ctx: Any, projections, inputs, residual, *adapters):
        output = projections.base_forward(inputs, residual, has_backward=ctx.needs_input_grad[1])
        ctx.projections, ctx.has_residual = projections, residual is not None
        ctx.count = len(adapters)
        if not adapters:
            return output
        adapted = projections.adapted()
        down, ups = projections.downs, projections.ups
        low = inputs.new_empty(inputs.shape[0], down.shape[0])  # scaled
        dropped: list[torch.Tensor] = []
        if any(member.lora.dropout() > 0.0 for member in adapted):
            for member in adapted:
                kept, mask = torch.native_dropout(inputs, member.lora.dropout(), train=True)
                _scaled_matmul(kept, down[member.ranks], member, low)
                dropped += [kept, mask]
        elif len({member.lora.scaling() for member in adapted}) == 1:
            scaling = adapted[0].lora.scaling()
            torch.addmm(low, inputs, down.t(), beta=0.0, alpha=scaling, out=low)
        else:
            for member in adapted:
                _scaled_matmul(inputs, down[member.ranks], member, low)
        for member, up in zip(adapted, ups, strict=True):
            output[:, member.columns].addmm_(low[:, member.ranks], up.t())
        ctx.save_for_backward(inputs, low, down, *ups, *dropped)
        return output

    @staticmethod
    def backward(ctx: Any, gradient):
        projections = ctx.projections
        into_residual = gradient if ctx.has_residual else None
        needs_input = ctx.needs_input_grad[1]
        d_inputs = projections.base_backward(gradient) if needs_input else None
        if not ctx.count:
            return None, d_inputs, into_residual
        adapted = projections.adapted()
        inputs, low, down, *rest = ctx.saved_tensors
        ups, dropped = rest[: len(adapted)], rest[len(adapted) :]
        d_low = torch.empty_like(low)
        d_ups = []
        for member, up in zip(adapted, ups, strict=True):
            part = gradient[:, member.columns]
            scaled = d_low[:, member.ranks]
            torch.addmm(scaled, part, up, beta=0.0, alpha=member.lora.scaling(), out=scaled)
            d_ups.append(_matmul(part.t(), low[:, member.ranks]))
        if dropped:
            d_downs = []
            for member, kept, mask in zip(adapted, dropped[0::2], dropped[1::2], strict=True):
                d_downs.append(_matmul(d_low[:, member.ranks].t(), kept))
                if d_inputs is not None:
                    through = d_low[:, member.ranks] @ down[member.ranks]
                    scale = 1.0 / (1.0 - member.lora.dropout())
                    d_inputs += torch.ops.aten.native_dropout_backward(through, mask, scale)
        else:
            d_downs = list(_matmul(d_low.t(), inputs).split([m.lora.rank for m in adapted]))
            if d_inputs is not None:
                d_inputs.addmm_(d_low, down)
        adapters = [g for pair in zip(d_downs, d_ups, strict=True) for g in pair]
        return None, d_inputs, into_residual, *adapters


def _scaled_matmul(
    inputs: torch.Tensor, down: torch.Tensor, member: AdaptedProjection, low: torch.Tensor
) -> None:
    """The member's part of `low`: its scaling times inputs A^T."""
    part = low[:, member.ranks]
    torch.addmm(part, inputs, down.t(), beta=0.0, alpha=member.lora.scaling(), out=part)


def _matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32 at least: an adapter's gradient is never rounded to bfloat16."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
