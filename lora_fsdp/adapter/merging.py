"""`merge`: base and adapter as one ordinary model, written tensor by tensor."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig

from lora_fsdp.adapter.deltas import Deltas
from lora_fsdp.adapter.folder import AdapterFolder, find_base, read_adapter_folder
from lora_fsdp.adapter.merged_files import atomic_draft, write_rest, write_weights
from lora_fsdp.adapter.proof import Proof, check_base, read_proof
from lora_fsdp.base.conversion.low_precision import Published, open_weights, published_in
from lora_fsdp.base.conversion.model_weights import ModelWeights
from lora_fsdp.base.folders import read_json_object
from lora_fsdp.base.stored_weights import base_folder, base_skeleton
from lora_fsdp.errors import (
    ArgumentError,
    MergeError,
    OutputFolderError,
    UnsupportedAdapterError,
)

logger = logging.getLogger(__name__)

_OUTPUT_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
#: LoRA settings that a merge honours, or that say nothing about the weights.
_HONOURED = {
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    "auto_mapping",
    "target_parameters",
}  # fmt: skip
#: Initialisations that leave the base as it is; the others (PiSSA, OLoRA, ...) take a part out.
_BASE_KEPT = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        output: the new model's folder.
        adapter, base: what was merged.
        dtype: of the new model's weights.
        merged: how many weights the adapter changed.
        files: the weight files.
        bytes: of the weights.
        notes: what to know about the result.
    """

    output: Path
    adapter: Path
    base: str
    dtype: str
    merged: int
    files: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.base} with {self.adapter}",
            f"  {self.merged} weights merged, {self.bytes / 1e9:.3f} GB of {self.dtype} in "
            f"{len(self.files)} file(s)",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> MergeResult:
    """Write base and adapter as one model, which `from_pretrained` loads without PEFT.

    One tensor of the base is in memory at a time, beside the adapter. The folder appears when it is
    complete, or not at all.

    Args:
        adapter: the adapter's folder.
        output: the new folder; it must not exist, or be empty.
        base: the base's folder or Hub name; `None` = the one that the adapter names.
        dtype: of the written weights; auto = each as the base has it.
        max_shard_size: of one weight file, such as "5GB".
        trust_remote_code: run Python code that comes with the base, to learn its architecture.

    Raises:
        OutputFolderError: `output` holds something.
        BaseMismatchError: the adapter was trained on another base; names both.
        UnsupportedAdapterError: it is not plain LoRA, so adding B·A would not be right.
        MergeError: a weight would overflow, is stored under another name, or cannot be written.
    """
    target = Path(output)
    _check_output(target, dtype)
    source, proof = read_adapter_folder(adapter), read_proof(adapter)
    refuse_what_is_not_plain(source)
    name, revision = find_base(source, given=base, beside=proof.base_beside if proof else None)
    folder = base_folder(name, revision=revision)
    published = _published(folder)
    skeleton = base_skeleton(folder, trust_remote_code=trust_remote_code)
    stored = open_weights(folder, published)
    weights = ModelWeights(skeleton, stored)
    if proof is not None:
        check_base(proof, weights.fingerprint(), adapter=source.path, base=name)
    deltas = Deltas(source, skeleton, weights, base=name)
    with atomic_draft(target) as draft:
        files, size = write_weights(
            draft, stored, deltas, _OUTPUT_DTYPES.get(dtype), max_shard_size
        )
        write_rest(draft, folder, source.path, dtype=dtype, with_code=trust_remote_code)
    notes = _notes(proof, base=name)
    if published is not None:
        notes += (f"The base's files are in {published.name}; the merged model's hold numbers.",)
    for note in notes:
        logger.warning("%s", note)
    return MergeResult(target, source.path, name, dtype, len(deltas), files, size, notes)


def _check_output(target: Path, dtype: str) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputFolderError(f"{target} already holds something: choose another folder.")
    if dtype != "auto" and dtype not in _OUTPUT_DTYPES:
        known = ", ".join(["auto", *_OUTPUT_DTYPES])
        raise ArgumentError(f"dtype {dtype!r} is none of {known}.")


def refuse_what_is_not_plain(adapter: AdapterFolder) -> None:
    """Raise `UnsupportedAdapterError` unless base + B·A is all that the adapter computes."""
    defaults = LoraConfig()
    for field in fields(LoraConfig):
        value, default = getattr(adapter.config, field.name), getattr(defaults, field.name)
        if field.name not in _HONOURED and value != default and value not in (None, [], {}, False):
            raise UnsupportedAdapterError(
                f"{adapter.path} is not plain LoRA ({field.name} is set): adding it to the base's "
                "weights would not give the same model. Use it as an adapter."
            )
    if adapter.config.bias != "none":
        raise UnsupportedAdapterError(
            f"{adapter.path} has trained biases of the base (bias: {adapter.config.bias}), which "
            "are not merged. Use it as an adapter."
        )
    if adapter.config.init_lora_weights not in _BASE_KEPT:
        raise UnsupportedAdapterError(
            f"{adapter.path} was initialised by {adapter.config.init_lora_weights!r}, which takes "
            "a part out of the base: merging onto the base as published would count it twice. "
            "Use it as an adapter."
        )


def _published(folder: Path) -> Published | None:
    """The low precision of the base's files; `None` if they hold the numbers."""
    known = (folder / "config.json").is_file()
    settings = read_json_object(folder, "config.json").get("quantization_config") if known else None
    published = published_in(settings)
    if settings and published is None:
        raise MergeError(
            f"{folder} is a quantised model, whose weights cannot be added to: give the original "
            "model it was made from (--base, or base=... in Python)."
        )
    return published


def _notes(proof: Proof | None, *, base: str) -> tuple[str, ...]:
    if proof is None:
        note = f"The adapter has no proof of its base: only its shapes were compared with {base}."
        return (note,)
    if proof.base_quantization is None:
        return ()
    return (
        "The adapter was trained on a quantised base, whose rounding it has learnt to live with: "
        "the merged model's answers differ slightly from those in training. Evaluate it.",
    )
