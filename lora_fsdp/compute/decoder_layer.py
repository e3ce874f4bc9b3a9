"""The fused decoder layer: Llama's shape, which Mistral, Qwen and many others share.

The layer's modules stay as they are. Only the layer's `forward` is replaced, and only for packed
sequences: generation, other masks and anything unusual run transformers' own code.
`lora_fsdp.compute.fusing` says which layers have this shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_fsdp.compute.attention import attend
from lora_fsdp.compute.fused_functions import (
    project,
    rms_norm,
    silu_multiply,
    split_and_rotate,
)
from lora_fsdp.compute.projections import AdaptedProjection, Projections
from lora_fsdp.compute.unpacking import QuantizedBlock, UnpackAhead

#: The linear layers of each block, and the norms that stand before them.
LINEARS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("mlp", ("gate_proj", "up_proj", "down_proj")),
)
#: Norms of queries and keys, head by head.
HEAD_NORMS = ("q_norm", "k_norm")


class FusedLayer:
    """Computes one decoder layer on a packed sequence [1, T, H].

    Args:
        layer: a decoder layer of Llama's shape (`why_not_fused`).
    """

    #: What holds linear layers of one input.
    joined: type[Projections] = Projections

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        self.original = layer.forward
        self.first_norm: nn.Module = layer.input_layernorm  # type: ignore[assignment]
        self.second_norm: nn.Module = layer.post_attention_layernorm  # type: ignore[assignment]
        self.query_key_value = self.joined([attention.q_proj, attention.k_proj, attention.v_proj])  # type: ignore[union-attr,list-item]
        self.output = self.joined([attention.o_proj])  # type: ignore[union-attr,list-item]
        self.gate_up = self.joined([mlp.gate_proj, mlp.up_proj])  # type: ignore[union-attr,list-item]
        self.down = self.joined([mlp.down_proj])  # type: ignore[union-attr,list-item]
        self.scaling = float(attention.scaling)  # type: ignore[union-attr,arg-type]
        width = int(attention.head_dim)  # type: ignore[union-attr,arg-type]
        query, key, value = (
            (member.columns.stop - member.columns.start) // width
            for member in self.query_key_value.members
        )
        self.heads = (query, key, value)
        inner = dict(attention.named_children())  # type: ignore[union-attr]
        self.head_norms = [inner[name] for name in HEAD_NORMS if name in inner]
        #: Positions whose hidden states alone are given, [1, len(only_at), H]; `None` = all. For
        #: the last layer, of which only the label positions are used: their queries, and what
        #: follows attention. Not for masks with blocks.
        self.only_at: torch.Tensor | None = None
        self._usable = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.query_key_value.members[0].linear.weight.dtype

    @property
    def projections(self) -> tuple[Projections, ...]:
        """All linear layers."""
        return self.query_key_value, self.output, self.gate_up, self.down

    def is_as_fused(self) -> bool:
        """Whether the layer still holds the modules it was fused from, with the same adapter.

        Not after PEFT has merged, unloaded or switched an adapter; the original runs then.
        """
        attention, mlp = self.layer.self_attn, self.layer.mlp
        blocks = ((attention, LINEARS[0][1]), (mlp, LINEARS[1][1]))
        now = [getattr(block, name) for block, names in blocks for name in names]
        members = [m for projections in self.projections for m in projections.members]
        adapters = [m.lora for m in members if isinstance(m, AdaptedProjection)]
        return (
            {id(module) for module in now} <= {id(member.module) for member in members}
            and all(adapter.is_as_made() for adapter in adapters)
            and len({adapter.is_on() for adapter in adapters}) <= 1
        )

    def prepare(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Before a forward of the model: the adapter's copies to be made (`Projections.copies`)."""
        self._usable = self.is_as_fused()
        if not self._usable:
            return []
        return [pair for projections in self.projections for pair in projections.copies()]

    def join_weights(self) -> None:
        """Lay projections of one input in one block each. Not for sharded layers."""
        self.query_key_value.join()
        self.gate_up.join()

    def packed_blocks(self) -> list[QuantizedBlock]:
        """Of the matmuls, in their order; empty unless all weights are packed."""
        blocks = [projections.packed for projections in self.projections]
        return [block for block in blocks if block] if all(blocks) else []

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: object | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """As the original layer; packed sequences by the fused computation."""
        if (
            position_embeddings is None
            or past_key_values is not None
            or not self._usable
            or not _is_packed(hidden_states, attention_mask)
        ):
            result: torch.Tensor = self.original(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **others,
            )
            return result
        cosine, sine = (table[0] for table in position_embeddings)
        mask = cast(torch.Tensor | BlockMask, attention_mask)

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            return self.compute(hidden, mask, cosine, sine)

        layer = self.layer
        if isinstance(layer, GradientCheckpointingLayer) and self._must_recompute():
            output = layer._gradient_checkpointing_func(compute, hidden_states[0])  # type: ignore[operator]
        else:
            output = compute(hidden_states[0])
        # Not a view to autograd, of which FSDP warns: nothing else holds `output`.
        batch: torch.Tensor = torch.ops.aten._unsafe_view(output, [1, *output.shape])
        return batch

    def _must_recompute(self) -> bool:
        """Whether this layer has to recompute its activations in backward.

        transformers does so in the layer's `forward`, which this stands for; older versions in
        `__call__`, where it still happens.
        """
        if not (self.layer.gradient_checkpointing and self.layer.training):
            return False
        return type(self.layer).__call__ is nn.Module.__call__

    def compute(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | BlockMask,
        cosine: torch.Tensor,
        sine: torch.Tensor,
    ) -> torch.Tensor:
        """The layer on `hidden` [T, H]."""
        normed, residual = rms_norm(hidden, *_norm(self.first_norm))
        joined = self.project(self.query_key_value, self.spread(normed))
        if self.head_norms:
            joined = self._norm_heads(joined)
        query, key, value = split_and_rotate(joined, cosine, sine, heads=self.heads)
        if self.only_at is not None and isinstance(mask, torch.Tensor):
            residual = self.residual_at(residual, self.only_at)
            query = query.index_select(2, self.only_at)
            context = self.context(query, key, value, self.rows_of(mask, self.only_at))
        else:
            context = self.gather(self.context(query, key, value, mask))
        hidden = self.project(self.output, context, residual)
        normed, residual = rms_norm(hidden, *_norm(self.second_norm))
        gated = silu_multiply(self.project(self.gate_up, normed))
        return self.project(self.down, gated, residual)

    def project(
        self, projections: Projections, inputs: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `fused_functions.project`."""
        return project(projections, inputs, residual)

    def context(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """What attention gives, [T, query heads * D]."""
        found = attend(query, key, value, mask, scaling=self.scaling)
        return found[0].transpose(0, 1).flatten(1)

    def spread(self, normed: torch.Tensor) -> torch.Tensor:
        """The tokens [T, H] as attention has them."""
        return normed

    def gather(self, context: torch.Tensor) -> torch.Tensor:
        """What attention gives, [T, ...], as the residual has its tokens."""
        return context

    def residual_at(self, residual: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The residual at places of attention's."""
        return residual.index_select(0, positions)

    def rows_of(self, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Of the mask, what `positions` see."""
        return mask.index_select(2, positions)

    def _norm_heads(self, joined: torch.Tensor) -> torch.Tensor:
        """Queries and keys normed head by head (Qwen3)."""
        parts = list(
            joined.split(
                [m.columns.stop - m.columns.start for m in self.query_key_value.members], 1
            )
        )
        for index, norm in enumerate(self.head_norms):
            weight, epsilon = _norm(norm)
            by_head = parts[index].reshape(-1, weight.shape[0])
            parts[index] = rms_norm(by_head, weight, epsilon)[0].view(parts[index].shape)
        return torch.cat(parts, dim=1)


def unpack_ahead(fused: Sequence[FusedLayer], *, recomputed: bool) -> None:
    """Unpack weights ahead of their use, if all are packed. For unsharded ones in a graph.

    Args:
        fused: all decoder layers, in their order.
        recomputed: backward computes each layer's forward again.
    """
    blocks = [layer.packed_blocks() for layer in fused]
    if all(blocks):
        ahead = UnpackAhead(blocks, recomputed=recomputed)
        for layer in fused:
            for projections in layer.projections:
                projections.unpacking = ahead


@torch.no_grad()
def copy_adapters(fused: Sequence[FusedLayer]) -> None:
    """Bring the adapters' copies up to date, all in one go."""
    pairs = [pair for layer in fused for pair in layer.prepare()]
    if pairs:
        torch._foreach_copy_([copy for copy, _ in pairs], [original for _, original in pairs])


def _norm(module: nn.Module) -> tuple[torch.Tensor, float]:
    """An RMS norm's weight and epsilon."""
    return module.weight, float(module.variance_epsilon)  # type: ignore[return-value,arg-type]


def _is_packed(hidden: torch.Tensor, mask: object) -> bool:
    """Whether `mask` is a packed sequence's (`lora_fsdp.compute.attention`)."""
    if isinstance(mask, BlockMask):
        return True
    return (
        isinstance(mask, torch.Tensor)
        and mask.shape == (1, 1, hidden.shape[1], hidden.shape[1])
        and mask.is_floating_point()
        and hidden.shape[0] == 1
    )
