"""Writing safetensors files tensor by tensor: one tensor in memory, never a whole shard.

safetensors' own writer takes all tensors of a file at once. The format is its
(https://github.com/huggingface/safetensors#format): the header's length, the header as JSON, the
tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: Dtypes by their names in a file's header.
DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def write_tensors(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    make: Callable[[str], torch.Tensor],
) -> None:
    """Write a safetensors file and flush it to the disk.

    Args:
        file: to be created.
        tensors: for each name a tensor of the shape and dtype it will have (on the meta device).
        make: gives the tensor of a name; called once each, in order.

    Raises:
        ValueError: `make` gives another shape or dtype than announced.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name, expected in tensors.items():
            tensor = make(name)
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
            # As bytes, because NumPy has no bfloat16.
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
