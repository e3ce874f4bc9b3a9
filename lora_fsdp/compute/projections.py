"""Linear layers of one input, with their LoRA adapters, as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_fsdp.base.quantized_layers import QuantizedLayer
from lora_fsdp.compute.unpacking import QuantizedBlock, UnpackAtUse

# PEFT's, around a plain linear layer and around a packed one (which it can import with bitsandbytes
# only).
_LORA_LINEARS = ("Linear", "Linear4bit")


class Projection:
    """One linear layer and its place in the joined output.

    Reads weights and adapter from the module at every use.

    Attributes:
        columns: its slice of the joined output.
        ranks: its slice of the joined A matrices.
    """

    def __init__(self, module: nn.Module, *, columns: slice, first_rank: int) -> None:
        self.module = module
        self.linear: nn.Linear | QuantizedLayer = (
            module.base_layer if isinstance(module, LoraLayer) else module  # type: ignore[assignment]
        )
        self.columns = columns
        self.rank = 0
        if isinstance(module, LoraLayer):
            self.name = str(module.active_adapters[0])
            self.rank = int(module.r[self.name])
        self.ranks = slice(first_rank, first_rank + self.rank)

    def is_as_made(self) -> bool:
        """Whether the module's adapter is the one it had, and not merged."""
        if not self.rank:
            return True
        active = list(self.module.active_adapters)  # type: ignore[arg-type]
        return active == [self.name] and not self.module.merged

    def adapters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, in] and B [out, r], float32."""
        a, b = self.module.lora_A[self.name], self.module.lora_B[self.name]  # type: ignore[index]
        return a.weight, b.weight  # type: ignore[union-attr]

    def weight(self) -> torch.Tensor:
        """The frozen weight [out, in]; a packed one unpacked, in memory of its own."""
        if not isinstance(self.linear, QuantizedLayer):
            return self.linear.weight
        return QuantizedBlock([self.linear]).unpack()

    def scaling(self) -> float:
        """What the update is multiplied with."""
        return float(self.module.scaling[self.name])  # type: ignore[index]

    def dropout(self) -> float:
        """Share of the adapter's input that is dropped; 0 when not training."""
        dropout = self.module.lora_dropout[self.name]  # type: ignore[index]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class Projections:
    """Linear layers of one input, side by side.

    Args:
        modules: `nn.Linear`, or PEFT's LoRA layer around one (see `can_project`).
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.members: list[Projection] = []
        first_column = first_rank = 0
        for module in modules:
            width = int(module.out_features)  # type: ignore[arg-type]
            columns = slice(first_column, first_column + width)
            self.members.append(Projection(module, columns=columns, first_rank=first_rank))
            first_column += width
            first_rank += self.members[-1].rank
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
        originals = [member.adapters() for member in adapted]
        ranks = [member.rank for member in adapted]
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

    def adapted(self) -> list[Projection]:
        """The members whose adapter is on."""
        return [m for m in self.members if m.rank and not m.module.disable_adapters]

    def adapters(self) -> list[nn.Parameter]:
        """A and B of every adapted member, in turn."""
        return [parameter for member in self.adapted() for parameter in member.adapters()]

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


def can_project(module: nn.Module) -> bool:
    """Whether `Projections` computes `module`: a frozen linear layer, perhaps with plain LoRA."""
    if _is_linear(module):
        return not any(parameter.requires_grad for parameter in module.parameters())
    if not isinstance(module, LoraLayer) or type(module).__name__ not in _LORA_LINEARS:
        return False
    names = module.active_adapters
    return (
        _is_linear(module.base_layer)
        and len(names) == 1
        and list(module.lora_A) == names  # one adapter, and it is the active one
        and not module.merged
        and not module.fan_in_fan_out
        and not module.lora_variant
        and module.lora_A[names[0]].bias is None
        and module.lora_B[names[0]].bias is None
        and type(module.lora_dropout[names[0]]) in (nn.Dropout, nn.Identity)
        and not any(p.requires_grad for p in module.base_layer.parameters())
    )


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, QuantizedLayer)
