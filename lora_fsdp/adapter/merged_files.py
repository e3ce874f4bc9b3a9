"""A merged model's folder: written tensor by tensor, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from lora_fsdp.adapter.deltas import Deltas
from lora_fsdp.base.folders import contained_file, read_json_object
from lora_fsdp.base.stored_weights import INDEX_FILE, BaseWeights
from lora_fsdp.base.tensor_files import DTYPES, write_tensors
from lora_fsdp.errors import ArgumentError, LoraFsdpError, MergeError

_GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


@contextmanager
def atomic_draft(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when all went well, and else is removed."""
    draft = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.tmp")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
        draft.replace(target.absolute())
    except LoraFsdpError:  # some of which are OSErrors too
        raise
    except OSError as error:
        raise MergeError(
            f"{target} could not be written ({error.strerror or error}): nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_weights(
    draft: Path,
    weights: BaseWeights,
    deltas: Deltas,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> tuple[tuple[str, ...], int]:
    """Write the merged weights into `draft`; returns the files' names and the weights' bytes."""
    planned = {}
    for name, stored in weights.tensors.items():
        own = DTYPES.get(stored.dtype)  # none for 8-bit floats
        if own is None:
            raise MergeError(f"{weights.folder}: {name} is {stored.dtype}, which is not merged.")
        kept = own if dtype is None or not own.is_floating_point else dtype
        planned[name] = torch.empty(stored.shape, dtype=kept, device="meta")
    try:
        plan = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ArgumentError(f"max_shard_size {max_shard_size!r}: {error}") from error

    for file, names in plan.filename_to_tensors.items():
        write_tensors(
            draft / file,
            {name: planned[name] for name in names},
            make=lambda name: merged_tensor(name, weights, deltas, planned[name].dtype),
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write(draft / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    size = sum(tensor.numel() * tensor.element_size() for tensor in planned.values())
    return tuple(plan.filename_to_tensors), size


def merged_tensor(
    name: str, weights: BaseWeights, deltas: Deltas, dtype: torch.dtype
) -> torch.Tensor:
    """The base's tensor with what the adapter adds, in `dtype`; added up in float32.

    Raises:
        MergeError: a number does not fit `dtype` (65,504 is the largest in float16).
    """
    tensor = weights.read(name)
    if name in deltas:
        tensor = tensor.float() + deltas[name]
    if not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if not result.isfinite().all():
        largest = tensor.float().abs().nan_to_num(posinf=float("inf")).max().item()
        raise MergeError(
            f"{name} cannot be written as {str(dtype).removeprefix('torch.')}: its largest number "
            f"is {largest:g}, or it holds NaN. Choose bfloat16 or float32."
        )
    return result


def write_rest(draft: Path, base: Path, adapter: Path, *, dtype: str, with_code: bool) -> None:
    """Copy configuration and tokenizer; the adapter's own tokenizer goes before the base's.

    Args:
        draft: where to.
        base, adapter: their folders.
        dtype: what the weights were written in; `auto` = as in the base.
        with_code: copy the base's own Python files, without running them.
    """
    config = read_json_object(base, "config.json")
    config.pop("quantization_config", None)  # of files that held something else than numbers
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    _write(draft / "config.json", json.dumps(config, indent=2) + "\n")
    has_own = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    copied = dict.fromkeys(_TOKENIZER_FILES, adapter if has_own else base)
    copied[_GENERATION_FILE] = base
    if with_code:
        copied |= {file.name: base for file in base.glob("*.py")}
    for name, folder in copied.items():
        if (folder / name).is_file():
            shutil.copyfile(contained_file(folder, name), draft / name)


def _write(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
