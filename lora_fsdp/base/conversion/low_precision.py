"""Weights that were published in low precision, unpacked while they are read.

Two layouts, both of which transformers writes and reads too:

* FP8 in blocks (DeepSeek-V3, Qwen3-FP8): beside each `weight` of 8-bit floats a `weight_scale_inv`
  with a number for each block of rows and columns;
* MXFP4 (gpt-oss; OCP Microscaling Formats, version 1.0): of a stack of experts `NAME_blocks`, 32
  values of 4 bits in 16 bytes, and `NAME_scales`, an exponent for each; rows are the model's
  columns.

No kernel here computes from them, so a model holds what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from lora_fsdp.base.stored_weights import BaseWeights, StoredTensor
from lora_fsdp.errors import ModelNotFoundError

_SCALES = "_scale_inv"
_BYTES_OF_FP8 = "F8_E4M3"
_MX_BLOCK = 32
# E2M1, the sign in the highest bit.
_FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_FP4 += [-value for value in _FP4]
_EXPONENT_BIAS = 127

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Published:
    """In which low precision a model's files are.

    Attributes:
        name: in words.
        block: rows and columns that share a scale; `None` where the layout itself says.
    """

    name: str
    block: tuple[int, int] | None = None


def published_in(settings: object) -> Published | None:
    """The layout that a config's `quantization_config` means; `None` if it is none of these two.

    Args:
        settings: the dictionary or the object that stands in the config.
    """
    to_dict = getattr(settings, "to_dict", None)
    found: Any = settings if to_dict is None else to_dict()
    if not isinstance(found, Mapping):
        return None
    if found.get("quant_method") == "mxfp4":
        return Published("MXFP4")
    block = found.get("weight_block_size")
    if found.get("quant_method") != "fp8" or not isinstance(block, list | tuple):
        return None
    if len(block) != 2 or not all(isinstance(side, int) and side > 0 for side in block):
        return None
    return Published("FP8 in blocks", (block[0], block[1]))


def open_weights(folder: Path, published: Published | None) -> BaseWeights:
    """A model folder's files, as if they held the numbers."""
    return BaseWeights(folder) if published is None else LowPrecisionWeights(folder, published)


class LowPrecisionWeights(BaseWeights):
    """A model folder's files as if they held the numbers: names, shapes, values.

    Numbers of FP8 are float32, of which `tensors` says BF16, the dtype they were published for;
    those of MXFP4 are exact in bfloat16.

    Args:
        folder: the model's folder.
        published: the layout.

    Attributes:
        packed_bytes: of what is packed, with its scales, in the files.

    Raises:
        ModelNotFoundError: as `BaseWeights`; or scales do not fit what they belong to.
    """

    def __init__(self, folder: Path, published: Published) -> None:
        super().__init__(folder)
        self._stored = dict(self.tensors)
        self._block = published.block
        self._scales: dict[str, str] = {}
        self.packed_bytes = 0
        self.tensors = {}
        for name, stored in self._stored.items():
            self._add(name, stored)

    @property
    def unpacked(self) -> list[str]:
        """Names of the tensors that are unpacked while they are read."""
        return list(self._scales)

    def _add(self, name: str, stored: StoredTensor) -> None:
        scales = f"{name}{_SCALES}"
        base, is_blocks, _ = name.rpartition("_blocks")
        if self._block and stored.dtype == _BYTES_OF_FP8 and scales in self._stored:
            self._check_grid(name, stored.shape, self._stored[scales].shape)
            self._note(name, name, scales, stored.shape)
        elif is_blocks and f"{base}_scales" in self._stored and stored.dtype == "U8":
            *experts, rows, groups, size = stored.shape
            of_scales = self._stored[f"{base}_scales"].shape
            if len(experts) != 1 or 2 * size != _MX_BLOCK or of_scales != stored.shape[:-1]:
                raise ModelNotFoundError(
                    f"{self.folder}: {name} is {list(stored.shape)} with scales "
                    f"{list(of_scales)}, which is not MXFP4's layout: download it again."
                )
            self._note(base, name, f"{base}_scales", (*experts, groups * _MX_BLOCK, rows))
        elif not self._is_scales(name):
            self.tensors[name] = stored

    def _check_grid(self, name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
        assert self._block is not None
        grid = tuple(-(-n // side) for n, side in zip(shape[-2:], self._block, strict=False))
        if len(shape) < 2 or scales != (*shape[:-2], *grid):
            raise ModelNotFoundError(
                f"{self.folder}: {name} is {list(shape)} with scales {list(scales)}, and blocks of "
                f"{list(self._block)} (weight_block_size in config.json) need "
                f"{[*shape[:-2], *grid]}: download it again."
            )

    def _note(self, name: str, packed: str, scales: str, shape: tuple[int, ...]) -> None:
        self.packed_bytes += prod(self._stored[packed].shape)
        own = self._stored[scales]
        self.packed_bytes += prod(own.shape) * (4 if own.dtype == "F32" else 1)
        self._scales[name] = scales
        self.tensors[name] = StoredTensor(shape, "BF16", self._stored[packed].file)

    def _is_scales(self, name: str) -> bool:
        """Whether it says how another tensor is unpacked."""
        if name.endswith("_scales"):
            return f"{name.removesuffix('_scales')}_blocks" in self._stored
        of = self._stored.get(name.removesuffix(_SCALES))
        return name.endswith(_SCALES) and of is not None and of.dtype == _BYTES_OF_FP8

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        if name not in self._scales:
            return super().read(name)
        return self.reader(name)(tuple(slice(0, side) for side in self.tensors[name].shape))

    def reader(self, name: str) -> Callable[[Slices], torch.Tensor]:
        """Reads parts of a tensor."""
        if name not in self._scales:
            return super().reader(name)
        # First the scales, which may be in another file: one is open at a time.
        scales = self._file(self._stored[self._scales[name]].file).get_tensor(self._scales[name])
        unpack = self._fp8 if name in self._stored else self._mxfp4
        place = name if name in self._stored else f"{name}_blocks"
        packed = self._file(self._stored[place].file).get_slice(place)
        shape = self.tensors[name].shape

        def read(part: Slices) -> torch.Tensor:
            full = (*part, *(slice(None) for _ in shape[len(part) :]))
            ranges = [one.indices(side)[:2] for one, side in zip(full, shape, strict=True)]
            return unpack(packed, scales, [slice(*one) for one in ranges])

        return read

    def _fp8(self, packed: Any, scales: torch.Tensor, part: list[slice]) -> torch.Tensor:
        assert self._block is not None
        values = self._noted(packed[tuple(part)]).to(torch.float32)
        rows, columns = (
            torch.arange(one.start, one.stop) // side
            for one, side in zip(part[-2:], self._block, strict=True)
        )
        of_part = scales[tuple(part[:-2])]
        numbers = _powers(of_part) if of_part.dtype == torch.uint8 else of_part.float()
        return values * numbers.index_select(-2, rows).index_select(-1, columns)

    def _mxfp4(self, packed: Any, scales: torch.Tensor, part: list[slice]) -> torch.Tensor:
        experts, columns, rows = part
        groups = slice(columns.start // _MX_BLOCK, -(-columns.stop // _MX_BLOCK))
        bits = self._noted(packed[experts, rows, groups])
        values = torch.tensor(_FP4)
        pairs = torch.stack([values[(bits & 15).int()], values[(bits >> 4).int()]], dim=-1)
        numbers = pairs.flatten(-2) * _powers(scales[experts, rows, groups])[..., None]
        first = columns.start - groups.start * _MX_BLOCK
        wide = numbers.flatten(-2)[..., first : first + columns.stop - columns.start]
        return wide.transpose(1, 2).to(torch.bfloat16).contiguous()


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    return torch.exp2(exponents.to(torch.float32) - _EXPONENT_BIAS)
