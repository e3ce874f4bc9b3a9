"""Experts in 4 bits: NF4 with double quantisation, as linear layers are (`base/four_bit.py`).

Each expert's matrix is packed by itself, block by block, as it is read: beside the packed stack one
expert's numbers are in memory. Needs bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from torch import nn

from lora_fsdp.base.experts.packed import (
    PackedParameter,
    Packing,
    pack_parameters,
    stacked_parameters,
)
from lora_fsdp.base.four_bit import BLOCK, nf4_numbers, packed_shape

# Scales that share a scale of their own, as bitsandbytes has them.
_SCALES = 256


class Nf4Stack(Packing):
    """A stack of matrices [experts, rows, columns] in 4 bits.

    The scales of all are quantised together, so that the whole is what bitsandbytes would make of
    the stack, and is unpacked at once.

    Args:
        shape: of the stack.
        dtype: in which it computes.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._scales: QuantState | None = None

    def empty(self) -> PackedParameter:
        """The packed parameter without values, on the meta device."""
        packed = torch.empty(packed_shape(self.shape, self.dtype), dtype=self.dtype, device="meta")
        return PackedParameter(packed, requires_grad=False)

    @property
    def is_filled(self) -> bool:
        """Whether there are scales."""
        return self._scales is not None

    def quantize(
        self, read: Callable[[tuple[slice, ...]], torch.Tensor], *, device: torch.device
    ) -> torch.Tensor:
        """The packed form of what `read` gives part by part, on `device`; keeps the scales."""
        packed, scales = [], []
        for part in self._parts():
            values = read(part).to(device=device, dtype=self.dtype).contiguous()
            numbers, state = quantize_4bit(
                values, blocksize=BLOCK, quant_type="nf4", quant_storage=self.dtype
            )
            packed.append(numbers)
            scales.append(state.absmax)
        flat = torch.cat(scales)
        offset = flat.mean()
        quantized, of_scales = quantize_blockwise(flat - offset, blocksize=_SCALES)
        self._scales = QuantState(
            absmax=quantized,
            shape=self.shape,
            dtype=self.dtype,
            blocksize=BLOCK,
            code=state.code,
            quant_type="nf4",
            offset=offset,
            state2=of_scales,
        )
        return torch.cat(packed)

    def _parts(self) -> Iterator[tuple[slice, ...]]:
        """Expert by expert, or all at once where a block would reach over two of them."""
        matrix = tuple(slice(0, side) for side in self.shape[1:])
        if prod(self.shape[1:]) % BLOCK:
            yield (slice(0, self.shape[0]), *matrix)
            return
        for index in range(self.shape[0]):
            yield (slice(index, index + 1), *matrix)

    def unpack(self, packed: torch.Tensor, only: Iterable[int] | None = None) -> torch.Tensor:
        """The numbers of the full packed tensor; with `only`, of these experts."""
        assert self._scales is not None
        size = prod(self.shape[1:])
        if only is None or size % BLOCK:
            out = torch.empty(self.shape, dtype=self.dtype, device=packed.device)
            return nf4_numbers(packed, self._scales, out)
        state = self._scales
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        scales = scales.view(self.shape[0], -1)
        rows = packed.view(self.shape[0], -1)
        out = torch.empty(self.shape, dtype=self.dtype, device=packed.device)
        for index in only:
            one = QuantState(
                absmax=scales[index].contiguous(),
                shape=torch.Size([size]),
                dtype=self.dtype,
                blocksize=BLOCK,
                code=state.code,
                quant_type="nf4",
            )
            out[index] = dequantize_4bit(rows[index].reshape(-1, 1), one).view(self.shape[1:])
        return out


def pack_experts(model: nn.Module, *, dtype: torch.dtype) -> list[str]:
    """Put packed parameters, still empty, in place of all stacks of matrices; gives their names."""
    packed = []
    for name, module in list(model.named_modules()):
        if stacks := stacked_parameters(module):
            pack_parameters(
                module, {own: Nf4Stack(value.shape, dtype) for own, value in stacks.items()}
            )
            packed += [f"{name}.{own}" for own in stacks]
    return packed
