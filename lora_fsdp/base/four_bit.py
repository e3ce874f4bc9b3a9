"""Frozen linear layers in 4 bits: NF4 with double quantisation (QLoRA, arXiv 2305.14314).

The packed values are kept in a tensor of the dtype the model computes in, four or eight to an
element: FSDP2 shards floating-point parameters only, and leaves others out or spoils them. What
turns them back into numbers (a scale for every 64 values, itself in 8 bits: 0.13 bits a value)
is kept unsharded on every rank.

Needs bitsandbytes (`pip install "lora-fsdp[4bit]"`), which is imported here and nowhere else.
"""

from __future__ import annotations

# autograd.Function's forward and backward take what each function needs.
# mypy: disable-error-code="override, no-untyped-call"
from collections.abc import Sequence
from copy import copy
from typing import Any, cast

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.autograd import Function
from transformers import PreTrainedModel

from lora_fsdp.base.quantized_layers import QUANTIZED_WHILE_READ, QuantizedLayer
from lora_fsdp.errors import UnsupportedModelError

#: Values that share a scale.
BLOCK = 64
_NF4: dict[str, Any] = {
    "blocksize": BLOCK,
    "compress_statistics": True,
    "quant_type": "nf4",
}


class FourBitLinear(Linear4bit, QuantizedLayer):
    """A frozen linear layer whose weight is packed [values / 2 / bytes of an element, 1].

    bitsandbytes' own layer exchanges its weight in the forward, to find its scales again or to lay
    it out for a CPU; under FSDP2 the weight's storage comes and goes. Here the scales belong to the
    layer, and the forward only reads.

    Args:
        like: the layer it stands for; its weight may be on the meta device.
        dtype: in which it computes, and of the packed tensor's elements.
    """

    quant_state: QuantState

    def __init__(self, like: nn.Linear, *, dtype: torch.dtype) -> None:
        super().__init__(
            like.in_features,
            like.out_features,
            bias=like.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=dtype,
            device=torch.device("meta"),
        )
        packed = torch.empty(packed_shape(like.weight.shape, dtype), dtype=dtype, device="meta")
        self.weight = self._as_weight(packed)
        self.bias = like.bias

    def _as_weight(self, packed: torch.Tensor, scales: QuantState | None = None) -> Params4bit:
        return Params4bit(
            packed,
            requires_grad=False,
            quant_state=scales,
            **_NF4,
            quant_storage=packed.dtype,
            bnb_quantized=True,
        )

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """Pack `values` [out, in], which lie where the layer will compute; keep their scales."""
        packed, self.quant_state = quantize_4bit(
            values.to(self.compute_dtype).contiguous(),
            **_NF4,
            quant_storage=self.compute_dtype,
        )
        return packed

    def set_whole(self, packed: torch.Tensor) -> None:
        """Make what `quantize` gave the weight, on a rank that holds all of it."""
        self.weight = self._as_weight(packed, self.quant_state)

    @torch.no_grad()
    def unpack(self, out: torch.Tensor) -> torch.Tensor:
        """Write the weight's numbers into `out` [out, in], contiguous."""
        return nf4_numbers(self.weight, self.quant_state, out)

    @classmethod
    @torch.no_grad()
    def unpack_all(cls, layers: Sequence[QuantizedLayer], out: torch.Tensor) -> torch.Tensor:
        """Write the numbers of several layers' weights into `out`, one below the other."""
        whole = all(layer.in_features * layer.out_features % BLOCK == 0 for layer in layers)
        if not out.is_cuda or not whole:
            return super().unpack_all(layers, out)
        states = [cast(FourBitLinear, layer).quant_state for layer in layers]
        return _by_kernel([layer.weight for layer in layers], states, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias, in the layer's dtype."""
        computed = x.to(self.compute_dtype)
        if not x.is_cuda and self.in_features % BLOCK:
            result = cast(torch.Tensor, _MatmulOfRows.apply(computed, self))
            return (result if self.bias is None else result + self.bias).to(x.dtype)
        result = matmul_4bit(computed, self.weight, bias=self.bias, quant_state=self.quant_state)
        return result.to(x.dtype)


class _MatmulOfRows(Function):
    """x W^T where a row of W ends within a block, which bitsandbytes on a CPU gets wrong."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FourBitLinear) -> torch.Tensor:
        ctx.layer = layer
        return x @ _numbers_of(layer).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ _numbers_of(ctx.layer), None


def _numbers_of(layer: FourBitLinear) -> torch.Tensor:
    shape = (layer.out_features, layer.in_features)
    return layer.unpack(torch.empty(shape, dtype=layer.compute_dtype, device=layer.weight.device))


@torch.no_grad()
def nf4_numbers(packed: torch.Tensor, scales: QuantState, out: torch.Tensor) -> torch.Tensor:
    """Write the numbers of a packed tensor into `out`, contiguous."""
    if out.is_cuda and out.numel() % BLOCK == 0:  # the kernel takes whole blocks
        return _by_kernel([packed], [scales], out)
    # As one long row: of shorter ones, bitsandbytes on a CPU begins a block with each.
    flat = copy(scales)
    flat.shape = torch.Size([out.numel()])
    return out.copy_(dequantize_4bit(packed, flat).view(out.shape))


def _by_kernel(
    packed: Sequence[torch.Tensor], states: Sequence[QuantState], out: torch.Tensor
) -> torch.Tensor:
    from lora_fsdp.base import nf4_kernel

    nf4_kernel.unpack_nf4(
        [
            nf4_kernel.Nf4(
                one.detach().view(torch.uint8),
                scales=state.absmax,
                scales_of_scales=state.state2.absmax,
                offset=state.offset,
            )
            for one, state in zip(packed, states, strict=True)
        ],
        out,
        values=states[0].code,  # the same in all: NF4's, and bitsandbytes' own for scales
        scale_values=states[0].state2.code,
    )
    return out


def packed_shape(shape: torch.Size, dtype: torch.dtype) -> tuple[int, int]:
    """Of a weight of `shape` packed into elements of `dtype`.

    Raises:
        UnsupportedModelError: the weight does not fill whole elements.
    """
    elements, rest = divmod(shape.numel(), 2 * dtype.itemsize)
    if rest:
        raise UnsupportedModelError(
            f"A weight of shape {list(shape)} cannot be packed into {dtype} elements: run without "
            "--load_in_4bit."
        )
    return elements, 1


def replace_linear_layers(model: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """Put 4-bit layers, still empty, in place of all linear layers but the output head.

    Raises:
        UnsupportedModelError: there are none (GPT-2 has layers of its own kind).
    """
    head = model.get_output_embeddings()
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    ]
    if not linear:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layers that could be kept in 4 bits: run "
            "without --load_in_4bit."
        )
    for name, module in linear:
        model.set_submodule(name, FourBitLinear(module, dtype=dtype))
    # PEFT and transformers recognise a quantised model by these.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    name = str(dtype).removeprefix("torch.")
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": name,
        "bnb_4bit_quant_storage": name,
        QUANTIZED_WHILE_READ: True,
    }
