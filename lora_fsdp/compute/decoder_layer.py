"""The fused decoder layer: Llama's shape, which Mistral, Qwen and many others share.

The layer's modules stay what and where they are; only the layer's `forward` is exchanged, and only
for packed rows: generation, other masks and anything unusual run transformers' own code. Whether an
architecture has this shape is not decided by its name: the fused layer must give what the original
gives (`fuse_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_fsdp.base.quantized_layers import unpacked
from lora_fsdp.compute.attention import attend
from lora_fsdp.compute.fused_functions import (
    project,
    rms_norm,
    silu_multiply,
    split_and_rotate,
)
from lora_fsdp.compute.projections import Projections, can_project
from lora_fsdp.compute.unpacking import QuantizedBlock, UnpackAhead


class FusedLayer:
    """Computes one decoder layer on a packed row [1, T, H].

    Args:
        layer: a decoder layer of Llama's shape (`why_not_fused`).
    """

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        self.original = layer.forward
        self.first_norm: nn.Module = layer.input_layernorm  # type: ignore[assignment]
        self.second_norm: nn.Module = layer.post_attention_layernorm  # type: ignore[assignment]
        self.query_key_value = Projections([attention.q_proj, attention.k_proj, attention.v_proj])  # type: ignore[union-attr,list-item]
        self.output = Projections([attention.o_proj])  # type: ignore[union-attr,list-item]
        self.gate_up = Projections([mlp.gate_proj, mlp.up_proj])  # type: ignore[union-attr,list-item]
        self.down = Projections([mlp.down_proj])  # type: ignore[union-attr,list-item]
        self.scaling = float(attention.scaling)  # type: ignore[union-attr,arg-type]
        width = int(attention.head_dim)  # type: ignore[union-attr,arg-type]
        query, key, value = (
            (member.columns.stop - member.columns.start) // width
            for member in self.query_key_value.members
        )
        self.heads = (query, key, value)
        inner = dict(attention.named_children())  # type: ignore[union-attr]
        self.head_norms = [inner[name] for name in _HEAD_NORMS if name in inner]
        self._wanted: torch.Tensor | None = None
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
        blocks = ((attention, _LINEARS[0][1]), (mlp, _LINEARS[1][1]))
        now = [getattr(block, name) for block, names in blocks for name in names]
        members = [m for projections in self.projections for m in projections.members]
        by_module = {id(member.module): member for member in members}
        adapted = [member.module for member in members if member.rank]
        return (
            all(id(module) in by_module for module in now)
            and all(member.is_as_made() for member in members)
            and len({bool(module.disable_adapters) for module in adapted}) <= 1
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
        """Of the products, in their order; empty unless all weights are packed."""
        blocks = [projections.packed for projections in self.projections]
        return [block for block in blocks if block] if all(blocks) else []

    @contextmanager
    def gives_only(self, positions: torch.Tensor) -> Iterator[None]:
        """Within the block, give the hidden states at `positions` only, [1, len(positions), H].

        For the last layer, of which only the label positions are used: their queries, and what
        follows attention. Not for rows whose mask has blocks.
        """
        self._wanted = positions
        try:
            yield
        finally:
            self._wanted = None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: object | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """As the original layer; packed rows by the fused computation."""
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
        """Whether activations are to be recomputed in backward, and nobody else sees to it.

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
        joined = project(self.query_key_value, normed)
        if self.head_norms:
            joined = self._norm_heads(joined)
        query, key, value = split_and_rotate(joined, cosine, sine, heads=self.heads)
        if self._wanted is not None and isinstance(mask, torch.Tensor):
            residual = residual.index_select(0, self._wanted)
            query = query.index_select(2, self._wanted)
            mask = mask.index_select(2, self._wanted)
        context = attend(query, key, value, mask, scaling=self.scaling)
        context = context[0].transpose(0, 1).flatten(1)
        hidden = project(self.output, context, residual)
        normed, residual = rms_norm(hidden, *_norm(self.second_norm))
        return project(self.down, silu_multiply(project(self.gate_up, normed)), residual)

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


def fuse_layers(
    decoder: nn.Module,
    layers: Sequence[nn.Module],
    *,
    filled_copy: Callable[[nn.Module], nn.Module] | None = None,
) -> list[FusedLayer] | str:
    """Exchange the `forward` of `layers` for fused ones, if they compute the same.

    To be called before the layers are sharded, in training or evaluation mode. The adapters' copies
    in the base's dtype are made anew at every forward of `decoder`, so they are never stale.

    Args:
        decoder: the module that runs the layers.
        layers: its decoder layers.
        filled_copy: gives a copy of a layer with its weights, if `layers` have none yet. All are
            then compared with the first one's weights, of which a single copy exists.

    Returns:
        the fused layers, or why the layers stay as they are.
    """
    wanting = [reason for layer in layers if (reason := why_not_fused(layer))]
    if wanting:
        return wanting[0]
    fused = [FusedLayer(layer) for layer in layers]
    candidates = _candidates(layers, filled_copy)
    for index, candidate in enumerate(map(FusedLayer, candidates), start=-1):
        difference = _difference(candidate)
        if not difference < _TOLERANCE[candidate.dtype]:
            name = type(candidate.layer).__name__
            return f"{name} {max(index, 0)} computes something else (by {difference:.2g})"
    exchange_forwards(decoder, fused)
    return fused


def unpack_ahead(fused: Sequence[FusedLayer], *, recomputed: bool) -> None:
    """Let packed weights, if all are, be unpacked ahead of their use. For whole ones in a graph.

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


def exchange_forwards(decoder: nn.Module, fused: Sequence[FusedLayer]) -> None:
    """Let `fused` compute the layers that they were made of, whether or not they agree."""
    for replacement in fused:
        replacement.layer.forward = replacement
    # Bound to the list and not to names around it, so that a deep copy of the model has its own.
    decoder.register_forward_pre_hook(partial(_before_forward, fused))


def _candidates(
    layers: Sequence[nn.Module], filled_copy: Callable[[nn.Module], nn.Module] | None
) -> Iterator[nn.Module]:
    """What is compared: all layers, as some models have layers of two kinds, and before them the
    first without its dtype's rounding. Packed weights are unpacked: how a layer computes is in
    question here, and not with which numbers.
    """
    first = unpacked(layers[0]) if filled_copy is None else filled_copy(layers[0])
    yield deepcopy(first).float()
    for layer in layers:
        if filled_copy is None:
            yield unpacked(layer)
            continue
        copied, weights = deepcopy(unpacked(layer)), dict(first.named_parameters())
        if {n: p.shape for n, p in weights.items()} != {
            n: p.shape for n, p in copied.named_parameters()
        }:
            yield filled_copy(layer)
            continue
        copied.load_state_dict(first.state_dict(keep_vars=True), assign=True)
        yield copied


def _before_forward(fused: Sequence[FusedLayer], decoder: nn.Module, inputs: object) -> None:
    copy_adapters(fused)


@torch.no_grad()
def copy_adapters(fused: Sequence[FusedLayer]) -> None:
    """Bring the adapters' copies up to date, all in one go."""
    pairs = [pair for layer in fused for pair in layer.prepare()]
    if pairs:
        torch._foreach_copy_([copy for copy, _ in pairs], [original for _, original in pairs])


_LINEARS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("mlp", ("gate_proj", "up_proj", "down_proj")),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
# Of the layer's update, relative to its size; rounding alone makes a tenth of it.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def why_not_fused(layer: nn.Module) -> str | None:
    """Why `layer` has not the fused layer's shape; `None` if it has."""
    name = type(layer).__name__
    children = dict(layer.named_children())
    if set(children) != {"self_attn", "mlp", *_NORMS}:
        return f"{name} is built of other modules: {', '.join(sorted(children))}"
    for block, linears in _LINEARS:
        inner = dict(children[block].named_children())
        if missing := set(linears) - set(inner):
            return f"{name}.{block} has no {', '.join(sorted(missing))}"
        for linear in linears:
            if not can_project(inner[linear]):
                return f"{name}'s {linear} is no frozen linear layer with plain LoRA"
    attention, mlp = children["self_attn"], children["mlp"]
    inner = dict(attention.named_children())
    norms = {norm: children[norm] for norm in _NORMS}
    norms |= {norm: inner[norm] for norm in _HEAD_NORMS if norm in inner}
    for norm, module in norms.items():
        parameters = dict(module.named_parameters())
        if set(parameters) != {"weight"} or parameters["weight"].requires_grad:
            return f"{name}'s {norm} is no frozen RMS norm"
        if "variance_epsilon" not in vars(module):
            return f"{name}'s {norm} is another norm than Llama's"
    if not {"scaling", "head_dim"} <= vars(attention).keys():
        return f"{name}'s attention is another than Llama's"
    # In bfloat16 GELU could pass for it.
    if type(dict(mlp.named_children()).get("act_fn")).__name__ not in ("SiLU", "SiLUActivation"):
        return f"{name}'s MLP has another activation than SiLU"
    return None


@torch.no_grad()
def _difference(fused: FusedLayer) -> float:
    """How far the fused layer is from the original on random input, relative to its update."""
    attention = fused.layer.self_attn
    weight = fused.query_key_value.members[0].linear.weight
    generator = torch.Generator().manual_seed(0)
    tokens, width = 12, int(attention.head_dim)  # type: ignore[union-attr,arg-type]
    # Small, so that the layer's update, which does not depend on the scale, is not lost in it.
    hidden = torch.randn(1, tokens, weight.shape[1], generator=generator) * 0.01
    angles = torch.randn(tokens, width // 2, generator=generator).repeat(1, 2)
    causal = torch.full((tokens, tokens), float("-inf")).triu(1)
    hidden, cosine, sine, mask = (
        tensor.to(device=weight.device, dtype=weight.dtype)
        for tensor in (hidden, angles.cos()[None], angles.sin()[None], causal[None, None])
    )
    was_training = fused.layer.training
    fused.layer.eval()
    copy_adapters([fused])
    expected = fused.original(
        hidden, attention_mask=mask, position_embeddings=(cosine, sine), past_key_values=None
    )
    found = fused(hidden, attention_mask=mask, position_embeddings=(cosine, sine))
    fused.layer.train(was_training)
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return float("inf")
    update = (expected - hidden).float()
    return float((found - expected).float().norm() / update.norm())


def _norm(module: nn.Module) -> tuple[torch.Tensor, float]:
    """An RMS norm's weight and epsilon."""
    return module.weight, float(module.variance_epsilon)  # type: ignore[return-value,arg-type]


def _is_packed(hidden: torch.Tensor, mask: object) -> bool:
    """Whether `mask` is a packed row's (`lora_fsdp.compute.attention`)."""
    if isinstance(mask, BlockMask):
        return True
    return (
        isinstance(mask, torch.Tensor)
        and mask.shape == (1, 1, hidden.shape[1], hidden.shape[1])
        and mask.is_floating_point()
        and hidden.shape[0] == 1
    )
