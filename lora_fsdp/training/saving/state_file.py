"""Nested training state (optimizer, schedule, random numbers) as one safetensors file.

Tensors are stored as tensors and everything around them as JSON in the file's header, so that
nothing of a checkpoint is ever unpickled. What is read is what was written, types included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_fsdp.errors import CheckpointError, DamagedCheckpointError


def write_state(file: Path, state: Any) -> None:
    """Write nested dicts, lists, tuples, tensors, numbers, strings and None.

    Raises:
        CheckpointError: something else is among them.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encode(state, tensors))
    save_file(tensors, str(file), metadata={"state": text})


def read_state(file: Path) -> Any:
    """What `write_state` wrote, its tensors on the CPU.

    Raises:
        DamagedCheckpointError: it is no such file.
    """
    try:
        with safe_open(str(file), framework="pt") as opened:
            text = opened.metadata()["state"]
            return _decode(json.loads(text), opened)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read: {error}") from error


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        name = f"tensor{len(tensors)}"
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        items = [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]
        return {"dict": items}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    raise CheckpointError(
        f"A {type(value).__name__} in the training state cannot be saved: choose another --optim "
        "or --lr_scheduler_type."
    )


def _decode(value: Any, opened: Any) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return opened.get_tensor(content)
    if kind == "dict":
        return {_decode(key, opened): _decode(item, opened) for key, item in content}
    items = [_decode(item, opened) for item in content]
    return tuple(items) if kind == "tuple" else items
