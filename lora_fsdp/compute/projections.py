"""Linear layers of one input, with their LoRA adapters, as one matmul."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_fsdp.base.quantized_layers import QuantizedLayer
from lora_fsdp.compute.unpacking import QuantizedBlock, UnpackAtUse
from lora_fsdp.compute.variants.plain import PlainLora
from lora_fsdp.compute.variants.variant import LoraVariant, is_linear

#: The kinds of LoRA that are projected.
VARIANTS: tuple[type[LoraVariant], ...] = (PlainLora,)


def can_project(module: nn.Module) -> bool:
    """Whether `Projections` computes `module`: a frozen linear layer, perhaps with an adapter."""
    if isinstance(module, LoraLayer):
        return any(variant.fits(module) for variant in VARIANTS)
    return is_linear(module) and not any(p.requires_grad for p in module.parameters())


class Projection:
    """One linear layer and its place in the joined output.

    Reads weights from the module at every use.

    Attributes:
        module: the layer, with its adapter if it has one.
        linear: the frozen layer.
        columns: its slice of the joined output.
    """

    def __init__(
        self, module: nn.Module, linear: nn.Linear | QuantizedLayer, *, first_column: int
    ) -> None:
        self.module = module
        self.linear = linear
        self.columns = slice(first_column, first_column + linear.out_features)

    def weight(self) -> torch.Tensor:
        """The frozen weight [out, in]; a packed one unpacked, in memory of its own."""
        if not isinstance(self.linear, QuantizedLayer):
            return self.linear.weight
        return QuantizedBlock([self.linear]).unpack()


class AdaptedProjection(Projection):
    """A linear layer with an adapter.

    Attributes:
        lora: the adapter.
        ranks: its slice of the joined A matrices.
    """

    def __init__(
        self, module: nn.Module, lora: LoraVariant, *, first_column: int, first_rank: int
    ) -> None:
        super().__init__(module, lora.linear, first_column=first_column)
        self.lora = lora
        self.ranks = slice(first_rank, first_rank + lora.rank)


class Projections:
    """Linear layers of one input, side by side.

    Args:
        modules: `nn.Linear`, or PEFT's LoRA layer around one (see `can_project`).
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.members: list[Projection] = []
        column = rank = 0
        for module in modules:
            if isinstance(module, LoraLayer):
                variant = next(variant for variant in VARIANTS if variant.fits(module))
                lora = variant(module)
                self.members.append(
                    AdaptedProjection(module, lora, first_column=column, first_rank=rank)
                )
                rank += lora.rank
            else:
                self.members.append(Projection(module, module, first_column=column))  # type: ignore[arg-type]
            column = self.members[-1].columns.stop
        packed = [m.linear for m in self.members if isinstance(m.linear, QuantizedLayer)]
        self.packed = QuantizedBlock(packed) if len(packed) == len(self.members) else None
        self.unpacking = UnpackAtUse()
        self.joined: torch.Tensor | None = None
        self.downs = torch.empty(0)
        self.ups: list[torch.Tensor] = []

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Where each adapter matrix is to be copied before a forward: (copy, original).

        The copies, in the base's dtype, are `downs`, the A matrices joined [sum of ranks, in], and
        `ups`, each B [out, r].
        """
        adapted = self.adapted()
        if not adapted:
            return []
        originals = [member.lora.matrices() for member in adapted]
        ranks = [member.lora.rank for member in adapted]
        device, dtype = originals[0][0].device, adapted[0].linear.weight.dtype
        if not self.ups or self.downs.device != device or self.downs.dtype != dtype:
            width = originals[0][0].shape[1]
            self.downs = torch.empty(sum(ranks), width, device=device, dtype=dtype)
            self.ups = [torch.empty_like(b, dtype=dtype, device=device) for _, b in originals]
        downs = self.downs.split(ranks)
        pairs = zip(downs, self.ups, originals, strict=True)
        return [pair for down, up, (a, b) in pairs for pair in ((down, a), (up, b))]

    def join(self) -> None:
        """Lay the weights in one block, of which each layer's weight becomes a slice.

        Takes no memory in the end. Not for sharded weights, whose storage FSDP owns; packed ones
        are unpacked into one block whenever they are used.
        """
        if len(self.members) == 1 or any(
            isinstance(m.linear, QuantizedLayer) for m in self.members
        ):
            return
        weights = [member.linear.weight for member in self.members]
        self.joined = torch.cat([weight.detach() for weight in weights])
        for member, weight in zip(self.members, weights, strict=True):
            weight.data = self.joined[member.columns]

    def adapted(self) -> list[AdaptedProjection]:
        """The members whose adapter is on."""
        return [m for m in self.members if isinstance(m, AdaptedProjection) and m.lora.is_on()]

    def adapters(self) -> list[nn.Parameter]:
        """A and B of every adapted member, in turn."""
        return [parameter for member in self.adapted() for parameter in member.lora.matrices()]

    def base_forward(
        self, inputs: torch.Tensor, residual: torch.Tensor | None, *, has_backward: bool
    ) -> torch.Tensor:
        """x W^T + bias (+ residual), [T, sum of widths], in memory of its own.

        Args:
            inputs: [T, in].
            residual: [T, sum of widths].
            has_backward: `base_backward` will follow.
        """
        block = self._block()
        if self.packed is not None:
            block = self.unpacking.in_forward(self.packed, has_backward=has_backward)
        if block is None:
            output = inputs.new_empty(inputs.shape[0], self.members[-1].columns.stop)
            for member in self.members:
                torch.mm(inputs, member.weight().t(), out=output[:, member.columns])
        elif residual is not None:
            output, residual = torch.addmm(residual, inputs, block.t()), None
        else:
            output = inputs @ block.t()
        for member in self.members:
            if member.linear.bias is not None:
                output[:, member.columns] += member.linear.bias
        return output if residual is None else output.add_(residual)

    def base_backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient for the input through the frozen weights, [T, in]."""
        block = self._block()
        if self.packed is not None:
            block = self.unpacking.in_backward(self.packed)
        if block is not None:
            return gradient @ block
        first, *others = self.members
        result = gradient[:, first.columns] @ first.weight()
        for member in others:
            result.addmm_(gradient[:, member.columns], member.weight())
        return result

    def _block(self) -> torch.Tensor | None:
        """All weights in one block [sum of widths, in], if there is one that is not packed."""
        if self.packed is not None:
            return None
        if len(self.members) == 1:
            return self.members[0].weight()
        return self.joined if self._is_joined() else None

    def _is_joined(self) -> bool:
        """Whether the block still is what the layers hold (moving a model gives it new storage)."""
        if self.joined is None:
            return False
        storage = self.joined.untyped_storage().data_ptr()
        return all(m.linear.weight.untyped_storage().data_ptr() == storage for m in self.members)
