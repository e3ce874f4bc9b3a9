"""Linear layers whose frozen weight is stored packed, whatever the packing.

Code that computes with weights knows only two things of them: how a packed weight is turned back
into numbers, and how to make a module that holds the numbers instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from lora_fsdp.base.experts.packed import PackedExperts, plain_experts

#: In a base's quantization settings: its files are not quantised (`--load_in_4bit`).
QUANTIZED_WHILE_READ = "quantized_while_read"


class QuantizedLayer(nn.Module):
    """A linear layer that packs its weight when it is read (`lora_fsdp.base.four_bit`)."""

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    #: In which it computes.
    compute_dtype: torch.dtype

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """The packed form of `values`, which are the full weight."""
        raise NotImplementedError

    def set_whole(self, packed: torch.Tensor) -> None:
        """Make what `quantize` gave the weight, on a rank that holds all of it."""
        raise NotImplementedError

    def unpack(self, out: torch.Tensor) -> torch.Tensor:
        """Write the weight's numbers into `out` [out_features, in_features], contiguous."""
        raise NotImplementedError

    @classmethod
    def unpack_all(cls, layers: Sequence[QuantizedLayer], out: torch.Tensor) -> torch.Tensor:
        """Write the numbers of several layers' weights into `out`, one below the other."""
        parts = out.split([layer.out_features for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.unpack(part)
        return out


def unpacked(module: nn.Module) -> nn.Module:
    """The module itself, or a copy with plain layers and experts in place of its packed ones.

    Their weights are the packed ones' numbers, or on the meta device where those have none yet.
    """
    plain: dict[int, nn.Module] = {}
    for part in module.modules():
        if isinstance(part, QuantizedLayer):
            plain[id(part)] = _plain(part)
        elif isinstance(part, PackedExperts):
            plain[id(part)] = plain_experts(part)
    return deepcopy(module, plain) if plain else module


def _plain(layer: QuantizedLayer) -> nn.Linear:
    has_bias = layer.bias is not None
    plain = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    values = torch.empty_like(plain.weight, dtype=layer.compute_dtype, device=layer.weight.device)
    if not layer.weight.is_meta:
        layer.unpack(values)
    plain.weight = nn.Parameter(values, requires_grad=False)
    if layer.bias is not None:
        plain.bias = deepcopy(layer.bias)
    return plain
