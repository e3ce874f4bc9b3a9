"""What several adapters add to linear layers of one input: one batched product for all of them.

Each adapter's part of the input has the same number of tokens, so that the parts are a batch. The
adapters' matrices lie in one block each, [adapters, ...], those of a smaller rank filled up with
zeros, and those of an adapter that does not have the layer are zero. What adds zero changes
nothing, and every adapter's products are its own: nothing of one reaches another.

The matrices are copies in the base's dtype, as those of a single adapter are
(`lora_fsdp.compute.projections`), and gradients are summed in float32 at least, in blocks of the
same form. Prior art: the padded batches of S-LoRA (arXiv 2311.03285) and PLoRA (arXiv 2508.02932).
"""

# autograd.Function's forward and backward take what each function needs.
# mypy: disable-error-code="override, no-untyped-call, no-untyped-def, no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.autograd import Function


@dataclass(frozen=True, eq=False)
class StackedMember:
    """One linear layer's adapters.

    Attributes:
        module: PEFT's layer.
        columns: its slice of the joined output.
        ranks: its slice of the joined A matrices.
        up: the B matrices, [adapters, out, rank].
        up_gradient: theirs.
    """

    module: LoraLayer
    columns: slice
    ranks: slice
    up: torch.Tensor
    up_gradient: torch.Tensor


class StackedLora:
    """Several adapters of linear layers of one input.

    Args:
        modules: PEFT's layers around them, each with its slice of the joined output.

    Attributes:
        count: adapters; 0 = none of them has any of the layers.
        members: the layers that an adapter has.
        down: the A matrices of all layers, joined, [adapters, sum of ranks, in].
        down_gradient: theirs.
    """

    def __init__(self, modules: Sequence[tuple[LoraLayer, slice]]) -> None:
        self.modules = list(modules)
        self.stack([], dtype=torch.float32)

    def stack(self, names: Sequence[str], *, dtype: torch.dtype) -> None:
        """Make room for these adapters, in this order, and forget the others.

        Args:
            names: as PEFT calls them.
            dtype: of the copies.
        """
        self.names, self.members = list(names), list[StackedMember]()
        held = [
            (module, columns, [name for name in names if name in module.lora_A])
            for module, columns in self.modules
        ]
        held = [one for one in held if one[2]]
        self.count = len(names) if held else 0
        self.down = self.down_gradient = self.anchor = torch.empty(0)
        self._alpha: float | None = None
        self._scaling = torch.empty(0)
        if not held:
            return
        first = cast(nn.Linear, held[0][0].lora_A[held[0][2][0]]).weight
        wide = torch.promote_types(dtype, torch.float32)
        device = first.device
        rank = 0
        for module, columns, own in held:
            most = max(int(module.r[name]) for name in own)
            width = columns.stop - columns.start
            up = torch.zeros(self.count, width, most, device=device, dtype=dtype)
            ranks = slice(rank, rank + most)
            gradient = torch.zeros_like(up, dtype=wide)
            self.members.append(StackedMember(module, columns, ranks, up, gradient))
            rank += most
        self.down = torch.zeros(self.count, rank, first.shape[1], device=device, dtype=dtype)
        self.down_gradient = torch.zeros_like(self.down, dtype=wide)
        scales = [[member.module.scaling.get(name) for member in self.members] for name in names]
        known = {scale for row in scales for scale in row if scale is not None}
        if len(known) == 1:
            self._alpha = float(known.pop())
        else:  # of an adapter without the layer, whose matrices are zero, it does not matter
            widths = [member.ranks.stop - member.ranks.start for member in self.members]
            rows = [
                [one or 0.0 for one, width in zip(row, widths, strict=True) for _ in range(width)]
                for row in scales
            ]
            self._scaling = torch.tensor(rows, device=device, dtype=dtype)[:, None]
        # The frozen input of a first layer asks for no gradient: this does, and gets none.
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Where each adapter's matrices are to be copied before a pass: (copy, original)."""
        return [
            pair
            for place, member, down, up in self._own()
            for pair in (
                (self.down[place, member.ranks][: len(down)], down.detach()),
                (member.up[place, :, : len(down)], up.detach()),
            )
        ]

    def gradients(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Where each adapter's gradients are to be copied after the passes: (its own, here)."""
        return [
            (cast(torch.Tensor, parameter.grad), gradient)
            for place, member, down, up in self._own()
            for parameter, gradient in (
                (down, self.down_gradient[place, member.ranks][: len(down)]),
                (up, member.up_gradient[place, :, : len(down)]),
            )
        ]

    def blocks(self) -> list[torch.Tensor]:
        """The blocks of gradients, to be set to zero before the passes of a step."""
        return [self.down_gradient, *(m.up_gradient for m in self.members)] if self.count else []

    def add_to(self, output: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Add what the adapters add for `inputs` [N, in] to `output` [N, sum of widths].

        Returns:
            what `add_gradients` needs again, [adapters, N / adapters, sum of ranks].
        """
        parts = inputs.view(self.count, -1, inputs.shape[-1])
        low = parts.new_empty(*parts.shape[:2], self.down.shape[1])
        self._scaled(parts, self.down.mT, out=low)
        if self._alpha is None:
            low.mul_(self._scaling)
        into = output.view(self.count, -1, output.shape[-1])
        for member in self.members:
            into[:, :, member.columns].baddbmm_(low[:, :, member.ranks], member.up.mT)
        return low

    def add_gradients(
        self,
        gradient: torch.Tensor,
        inputs: torch.Tensor,
        low: torch.Tensor,
        d_inputs: torch.Tensor | None,
    ) -> None:
        """Add the matrices' gradients to their blocks, and that of the inputs to `d_inputs`.

        Args:
            gradient: of the output, [N, sum of widths].
            inputs, low: of the forward.
            d_inputs: [N, in]; `None` = not asked for.
        """
        parts = inputs.view(self.count, -1, inputs.shape[-1])
        gradients = gradient.reshape(self.count, -1, gradient.shape[-1])
        d_low = torch.empty_like(low)
        for member in self.members:
            own = gradients[:, :, member.columns]
            self._scaled(own, member.up, out=d_low[:, :, member.ranks])
            member.up_gradient.add_(_wide_product(own.mT, low[:, :, member.ranks]))
        if self._alpha is None:
            d_low.mul_(self._scaling)
        self.down_gradient.add_(_wide_product(d_low.mT, parts))
        if d_inputs is not None:
            d_inputs.view_as(parts).baddbmm_(d_low, self.down)

    def _scaled(self, left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        alpha = 1.0 if self._alpha is None else self._alpha
        torch.baddbmm(out, left, right, beta=0.0, alpha=alpha, out=out)

    def _own(self) -> list[tuple[int, StackedMember, nn.Parameter, nn.Parameter]]:
        """Of every adapter and layer: the adapter's place, the layer, A [r, in] and B [out, r]."""
        return [
            (
                place,
                member,
                cast(nn.Parameter, member.module.lora_A[name].weight),
                cast(nn.Parameter, member.module.lora_B[name].weight),
            )
            for member in self.members
            for place, name in enumerate(self.names)
            if name in member.module.lora_A
        ]


def add_adapters(stacked: StackedLora, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """`output` [1, N, width] of one linear layer, and what its adapters add for `inputs`."""
    if not stacked.count:
        return output
    added = _Added.apply(stacked, inputs[0].to(stacked.down.dtype), stacked.anchor)
    return output + added.to(output.dtype)


class _Added(Function):
    @staticmethod
    def forward(ctx: Any, stacked, inputs, anchor):
        inputs = inputs.contiguous()
        width = stacked.modules[0][1].stop
        output = inputs.new_zeros(inputs.shape[0], width)
        ctx.stacked = stacked
        ctx.save_for_backward(inputs, stacked.add_to(output, inputs))
        return output

    @staticmethod
    def backward(ctx: Any, gradient):
        inputs, low = ctx.saved_tensors
        d_inputs = torch.zeros_like(inputs) if ctx.needs_input_grad[1] else None
        ctx.stacked.add_gradients(gradient, inputs, low, d_inputs)
        return None, d_inputs, None


def _wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32 at least: an adapter's gradient is never rounded to bfloat16."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
