"""Which decoder layers are fused, found out on the layers themselves.

Whether an architecture has the fused layer's shape is not decided by its name: the fused layer must
give what the original gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lora_fsdp.base.quantized_layers import unpacked
from lora_fsdp.compute.decoder_layer import HEAD_NORMS, LINEARS, FusedLayer, copy_adapters
from lora_fsdp.compute.patches import Patches
from lora_fsdp.compute.projections import can_project

_NORMS = ("input_layernorm", "post_attention_layernorm")
# Of the layer's update, relative to its size; rounding alone makes a tenth of it.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Fusing:
    """What came of fusing.

    Attributes:
        layers: the fused layers, in their order; empty if none is.
        reason: why no layer is fused, in words.
    """

    layers: Sequence[FusedLayer] = ()
    reason: str = "its layers were not fused"

    @property
    def is_fused(self) -> bool:
        """Whether fused layers compute."""
        return bool(self.layers)


def fuse_layers(
    decoder: nn.Module,
    layers: Sequence[nn.Module],
    *,
    patches: Patches,
    filled_copy: Callable[[nn.Module], nn.Module] | None = None,
) -> Fusing:
    """Replace the `forward` of `layers` by fused ones, if they compute the same.

    To be called before the layers are sharded, in training or evaluation mode.

    Args:
        decoder: the module that runs the layers.
        layers: its decoder layers.
        patches: list what is replaced.
        filled_copy: gives a copy of a layer with its weights, if `layers` have none yet. All are
            then compared with the first one's weights, of which a single copy exists.
    """
    unfit = [reason for layer in layers if (reason := why_not_fused(layer))]
    if unfit:
        return Fusing(reason=unfit[0])
    fused = [FusedLayer(layer) for layer in layers]
    if (reason := why_different(layers, filled_copy)) is not None:
        return Fusing(reason=reason)
    exchange_forwards(decoder, fused, patches=patches)
    return Fusing(fused, reason="")


def why_different(
    layers: Sequence[nn.Module], filled_copy: Callable[[nn.Module], nn.Module] | None = None
) -> str | None:
    """Why fused layers do not compute what `layers`, of their shape, do; `None` if they do.

    Args:
        layers, filled_copy: as of `fuse_layers`.
    """
    candidates = _candidates(layers, filled_copy)
    for index, candidate in enumerate(map(FusedLayer, candidates), start=-1):
        difference = _difference(candidate)
        if not difference < _TOLERANCE[candidate.dtype]:
            name = type(candidate.layer).__name__
            return f"{name} {max(index, 0)} computes something else (by {difference:.2g})"
    return None


def exchange_forwards(decoder: nn.Module, fused: Sequence[FusedLayer], *, patches: Patches) -> None:
    """Let `fused` compute the layers that they were made of, without comparing them.

    The adapters' copies in the base's dtype are made anew at every forward of `decoder`, so they
    are never stale.
    """
    for replacement in fused:
        patches.set(
            replacement.layer,
            "forward",
            replacement,
            why="fused layers compute packed sequences",
        )
    # Bound to the list and not to names around it, so that a deep copy of the model has its own.
    hook = partial(_before_forward, fused)
    patches.before_forward(decoder, hook, why="fused layers get the adapter in the base's dtype")


def _before_forward(fused: Sequence[FusedLayer], decoder: nn.Module, inputs: object) -> None:
    copy_adapters(fused)


def _candidates(
    layers: Sequence[nn.Module], filled_copy: Callable[[nn.Module], nn.Module] | None
) -> Iterator[nn.Module]:
    """What is compared: the first layer without its dtype's rounding, then all layers, since some
    models have layers of two kinds. Packed weights are unpacked: the comparison is of how a layer
    computes, not of its numbers.
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


def why_not_fused(layer: nn.Module) -> str | None:
    """Why `layer` has not the fused layer's shape; `None` if it has."""
    name = type(layer).__name__
    children = dict(layer.named_children())
    if set(children) != {"self_attn", "mlp", *_NORMS}:
        return f"{name} is built of other modules: {', '.join(sorted(children))}"
    for block, linears in LINEARS:
        inner = dict(children[block].named_children())
        if missing := set(linears) - set(inner):
            return f"{name}.{block} has no {', '.join(sorted(missing))}"
        for linear in linears:
            if not can_project(inner[linear]):
                return f"{name}'s {linear} is no frozen linear layer with plain LoRA"
    attention, mlp = children["self_attn"], children["mlp"]
    inner = dict(attention.named_children())
    norms = {norm: children[norm] for norm in _NORMS}
    norms |= {norm: inner[norm] for norm in HEAD_NORMS if norm in inner}
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
        hidden,
        attention_mask=mask,
        position_embeddings=(cosine, sine),
        past_key_values=None,
        # Far out, where a layer that scales by position (Ministral 3) does something else.
        position_ids=torch.arange(tokens, device=weight.device)[None] + 2**20,
    )
    found = fused(hidden, attention_mask=mask, position_embeddings=(cosine, sine))
    fused.layer.train(was_training)
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return float("inf")
    update = (expected - hidden).float()
    return float((found - expected).float().norm() / update.norm())
