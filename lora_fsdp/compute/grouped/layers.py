"""Fused decoder layers for several adapters, each with a part of the tokens of its own.

The base's products, norms and rotations know no parts. What the adapters add is a batch of products
(`StackedLora`), and attention is a batch of the parts. Where no adapter is behind attention, what
fills the parts up to one size is left out there. Only a grouped pass computes so: everything else
(scoring, generation) runs the layers that stand below.
"""

# autograd.Function's forward and backward take what each function needs.
# mypy: disable-error-code="override, no-untyped-call, no-untyped-def, no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.autograd import Function

from lora_fsdp.compute.attention import attend
from lora_fsdp.compute.decoder_layer import FusedLayer
from lora_fsdp.compute.fused_functions import project
from lora_fsdp.compute.fusing import why_different, why_not_fused
from lora_fsdp.compute.grouped.stacked_lora import StackedLora
from lora_fsdp.compute.projections import Projections


class Rows(NamedTuple):
    """Tokens without most of what fills their parts up.

    Attributes:
        kept: [rows], the token in each row: those of every part and the first that fills it up.
        places: [tokens], the row of each token; of all that fills a part up that one.
    """

    kept: torch.Tensor
    places: torch.Tensor


@dataclass
class Parts:
    """What a grouped pass is computing.

    Attributes:
        count: parts, of one size; 0 = no grouped pass is under way.
        rows: of what is not attention; `None` = all tokens.
    """

    count: int = 0
    rows: Rows | None = None


class GroupedProjections(Projections):
    """Linear layers of one input, side by side, with several adapters.

    Attributes:
        stacked: the adapters.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__([m.base_layer if isinstance(m, LoraLayer) else m for m in modules])
        self.stacked = StackedLora(
            [
                (module, member.columns)
                for module, member in zip(modules, self.members, strict=True)
                if isinstance(module, LoraLayer)
            ]
        )


class GroupedLayer(FusedLayer):
    """Computes one decoder layer for several adapters.

    Args:
        layer: a decoder layer of Llama's shape, its linear layers with or without adapters.
        parts: shared by all layers.
    """

    joined = GroupedProjections

    def __init__(self, layer: nn.Module, parts: Parts) -> None:
        super().__init__(layer)
        self.parts = parts

    @property
    def stacks(self) -> list[StackedLora]:
        """The adapters of all its linear layers."""
        return [one.stacked for one in self.projections if isinstance(one, GroupedProjections)]

    def __call__(self, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        """As the original layer; the tokens of a grouped pass by the fused computation."""
        if not self.parts.count:
            result: torch.Tensor = self.original(hidden_states, *rest, **named)
            return result
        cosine, sine = (table[0] for table in named["position_embeddings"])
        output = self.compute(hidden_states[0], named["attention_mask"], cosine, sine)
        batch: torch.Tensor = torch.ops.aten._unsafe_view(output, [1, *output.shape])
        return batch

    @property
    def adapts_attention_only(self) -> bool:
        """Whether queries, keys and values alone have adapters."""
        behind = (self.output, self.gate_up, self.down)
        return not any(isinstance(p, GroupedProjections) and p.stacked.count for p in behind)

    def compute(
        self, hidden: torch.Tensor, mask: Any, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        """As `FusedLayer`, on all tokens or on their rows; gives rows where there are any."""
        rows = self.parts.rows
        if rows is not None and len(hidden) == len(rows.places):
            hidden = hidden.index_select(0, rows.kept)
        return super().compute(hidden, mask, cosine, sine)

    def spread(self, normed: torch.Tensor) -> torch.Tensor:
        """All tokens, from their rows."""
        rows = self.parts.rows
        return normed if rows is None else _Exchange.apply(normed, rows.places, rows.kept)

    def gather(self, context: torch.Tensor) -> torch.Tensor:
        """The rows, from all tokens."""
        rows = self.parts.rows
        return context if rows is None else _Exchange.apply(context, rows.kept, rows.places)

    def residual_at(self, residual: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The residual of tokens."""
        rows = self.parts.rows
        places = positions if rows is None else rows.places.index_select(0, positions)
        return residual.index_select(0, places)

    def project(
        self, projections: Projections, inputs: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Each part of `inputs` with its own adapter."""
        if not isinstance(projections, GroupedProjections) or not projections.stacked.count:
            return project(projections, inputs, residual)
        return _Project.apply(projections, inputs, residual, projections.stacked.anchor)

    def context(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """Attention of each part by itself, [T, query heads * D]; `mask` [parts, 1, ...]."""
        tokens = query.shape[2]
        query, key, value = (
            one[0].unflatten(1, (self.parts.count, -1)).transpose(0, 1)
            for one in (query, key, value)
        )
        found = attend(query, key, value, mask, scaling=self.scaling)
        return found.transpose(1, 2).reshape(tokens, -1)

    def rows_of(self, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Of the mask, what each part's `positions` see; as many of every part."""
        count, length = mask.shape[0], mask.shape[3]
        starts = torch.arange(count, device=positions.device)[:, None] * length
        own = positions.view(count, -1) - starts
        return mask.gather(2, own[:, None, :, None].expand(-1, -1, -1, length))


class _Project(Function):
    """y = x W^T, and to each part s B A x of its own adapter."""

    @staticmethod
    def forward(ctx: Any, projections, inputs, residual, anchor):
        inputs = inputs.contiguous()
        output = projections.base_forward(inputs, residual, has_backward=ctx.needs_input_grad[1])
        ctx.projections, ctx.has_residual = projections, residual is not None
        ctx.save_for_backward(inputs, projections.stacked.add_to(output, inputs))
        return output

    @staticmethod
    def backward(ctx: Any, gradient):
        inputs, low = ctx.saved_tensors
        into_residual = gradient if ctx.has_residual else None
        d_inputs = None
        if ctx.needs_input_grad[1]:
            d_inputs = ctx.projections.base_backward(gradient)
        ctx.projections.stacked.add_gradients(gradient, inputs, low, d_inputs)
        return None, d_inputs, into_residual, None


class _Exchange(Function):
    """Rows `to` of the input; `back` is the way back, as what only fills up has no gradient."""

    @staticmethod
    def forward(ctx: Any, inputs, to, back):
        ctx.save_for_backward(back)
        return inputs.index_select(0, to)

    @staticmethod
    def backward(ctx: Any, gradient):
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def group_layers(layers: Sequence[nn.Module], parts: Parts) -> tuple[list[GroupedLayer], str]:
    """The layers for several adapters, if these compute what the base's own layers do.

    They are compared without adapters. Nothing is replaced yet.

    Returns:
        the layers, or none and why not.
    """
    plain = [_without_adapters(layer) for layer in layers]
    reason = next((why for one in plain if (why := why_not_fused(one))), None)
    reason = reason or why_different(plain)
    return ([], reason) if reason else ([GroupedLayer(layer, parts) for layer in layers], "")


def _without_adapters(layer: nn.Module) -> nn.Module:
    """A copy with the same weights in the same memory."""
    kept: dict[int, Any] = {id(one): one for one in (*layer.parameters(), *layer.buffers())}
    for module in layer.modules():
        if isinstance(module, LoraLayer):
            kept[id(module)] = module.base_layer
    return deepcopy(layer, kept)
