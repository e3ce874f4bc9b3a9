"""An adapter's folder, written by anyone: checked before PEFT sees it."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from lora_fsdp.base.experts.packed import add_lora_to_numbers
from lora_fsdp.base.folders import open_safetensors, read_json_object
from lora_fsdp.base.layers import base_model
from lora_fsdp.errors import (
    AdapterVerificationError,
    ModelNotFoundError,
    UnsafeFileError,
    UnsupportedAdapterError,
)

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
#: Settings with which PEFT would import modules, read other files or multiply layers.
_REACHING_OUT = ("corda_config", "megatron_config", "arrow_config", "layer_replication")
#: What a name pattern may consist of: nothing that could take exponential time to match.
_HARMLESS_PATTERN = re.compile(r"(?:[\w^$-]|\\?\.(?!\*)|\.\*|\\d\+|\(\??:?\w+(?:\|\w+)*\))*")
_MOST_WILDCARDS = 3
_LARGEST_RANK = 65_536
_LONGEST_NAME = 1000


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA adapter on disk.

    Attributes:
        path: the folder.
        config: its settings; nothing in them is a regular expression that could run away.
        tensors: by name, on the CPU, all floating-point and finite.
    """

    path: Path
    config: LoraConfig
    tensors: Mapping[str, torch.Tensor]


def read_adapter_folder(folder: str | Path) -> AdapterFolder:
    """The adapter in `folder`, read without PEFT and without a model.

    Raises:
        AdapterVerificationError: a file is missing or damaged, or a setting is nonsense.
        UnsafeFileError: its weights are a pickle, or a file does not lie in the folder.
        UnsupportedAdapterError: it is not LoRA, or has settings that are not honoured here.
    """
    path = Path(folder)
    if not path.is_dir():
        raise AdapterVerificationError(f"There is no adapter folder {path.absolute()}.")
    tensors = read_adapter_tensors(path)
    return AdapterFolder(path, read_adapter_config(path, tensors), tensors)


def read_adapter_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's folder.

    Raises:
        AdapterVerificationError: they are missing, damaged, no floating-point numbers, or hold NaN
            or infinity.
        UnsafeFileError: they are a pickle, or do not lie in the folder.
    """
    if not (path / ADAPTER_FILE).is_file():
        for name in _PICKLES:
            if (path / name).exists():
                raise UnsafeFileError(
                    f"{path / name} is a pickle, which could run any code: it is not opened. Ask "
                    f"for the adapter as {ADAPTER_FILE}."
                )
        raise AdapterVerificationError(f"{path} holds no adapter ({ADAPTER_FILE} is missing).")
    with open_safetensors(path, ADAPTER_FILE) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise AdapterVerificationError(f"{path / ADAPTER_FILE} holds no tensors.")
    for name, tensor in tensors.items():
        if len(name) > _LONGEST_NAME:
            raise AdapterVerificationError(
                f"{path / ADAPTER_FILE}: the name {name[:80]!r}… is no adapter weight's."
            )
        if not tensor.is_floating_point():
            raise AdapterVerificationError(
                f"{path / ADAPTER_FILE}: {name} is {tensor.dtype} and no adapter weight."
            )
        if not tensor.float().isfinite().all():
            raise AdapterVerificationError(f"{path / ADAPTER_FILE}: {name} holds NaN or infinity.")
    return tensors


def zero_lora_b(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the `lora_B` that are zero everywhere; those of experts, which a run may never
    have sent a token, are left out.
    """
    return sorted(
        name
        for name, tensor in tensors.items()
        if ".lora_B" in name and ".experts." not in name and not tensor.any()
    )


def load_with_peft(adapter: AdapterFolder, base: PreTrainedModel) -> PeftModel:
    """`base`'s architecture with the adapter, made by PEFT's own functions on the meta device.

    This is what proves that PEFT can load the folder: its settings choose the modules, its key
    matching places every tensor. The base's weights play no part in either, so none are held.

    Raises:
        AdapterVerificationError: PEFT refuses it, or a tensor has no place, the wrong shape, or is
            missing.
    """
    return load_on_skeleton(adapter, skeleton_like(base))


def skeleton_like(base: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and settings as `base`, on the meta device."""
    with torch.device("meta"), no_init_weights():
        skeleton = type(base)(copy.deepcopy(base.config))
    skeleton.tie_weights()
    return skeleton


def load_on_skeleton(adapter: AdapterFolder, skeleton: PreTrainedModel) -> PeftModel:
    """See `load_with_peft`; `skeleton` is changed in place."""
    config = copy.deepcopy(adapter.config)
    with _peft_at_work(adapter, skeleton):
        model = PeftModel(skeleton, config, low_cpu_mem_usage=True)
        result: Any = set_peft_model_state_dict(
            model, dict(adapter.tensors), low_cpu_mem_usage=True
        )
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if stray := sorted([*result.unexpected_keys, *missing]):
        raise AdapterVerificationError(
            f"{adapter.path} and {type(skeleton).__name__} do not fit: {len(stray)} adapter "
            f"weights have no place or are missing (for example {stray[0]})."
        )
    return model


def attach_saved(adapter: AdapterFolder, base: PreTrainedModel) -> PeftModel:
    """`base` with the adapter of a folder, for use; `load_with_peft` must have accepted it.

    Raises:
        AdapterVerificationError: PEFT refuses it now: some variants of LoRA read their settings
            only where a base has weights.
    """
    config = copy.deepcopy(adapter.config)
    with _peft_at_work(adapter, base):
        model = PeftModel.from_pretrained(base, str(adapter.path), config=config)
    add_lora_to_numbers(model)
    return model.eval()


def attach_another(adapter: AdapterFolder, model: PeftModel, *, name: str) -> None:
    """Attach a folder's adapter beside those that `model` has; `load_with_peft` accepted it.

    Args:
        adapter: the folder's.
        model: with one adapter at least.
        name: what PEFT is to call it.

    Raises:
        AdapterVerificationError: PEFT refuses it.
    """
    with _peft_at_work(adapter, base_model(model)):
        model.add_adapter(name, copy.deepcopy(adapter.config))
        set_peft_model_state_dict(model, dict(adapter.tensors), adapter_name=name)
    add_lora_to_numbers(model)
    for key, parameter in model.named_parameters():
        if f".{name}." in f"{key}.":
            parameter.data = parameter.data.float()
    model.eval()


@contextmanager
def _peft_at_work(adapter: AdapterFolder, base: PreTrainedModel) -> Iterator[None]:
    """Turn what PEFT raises of settings that make no sense into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about fan_in_fan_out, which PEFT then sets itself
            yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise AdapterVerificationError(
            f"PEFT cannot load {adapter.path} into {type(base).__name__}: "
            f"{' '.join(reason[:3]) or type(error).__name__}"
        ) from error


def find_base(
    adapter: AdapterFolder, *, given: str | Path | None, beside: str | None
) -> tuple[str, str]:
    """Name and revision of the base: a folder that exists, or a Hub name.

    Args:
        adapter: which names a base.
        given: another one to take instead.
        beside: where the base lay as seen from the adapter's folder when it was saved, if known.

    Raises:
        ModelNotFoundError: the folder it names is not there; the message says what to give.
    """
    if given is not None:
        return str(given), "main"
    name = adapter.config.base_model_name_or_path
    if not isinstance(name, str) or not name or "\0" in name:
        raise ModelNotFoundError(
            f"{adapter.path} does not say which base model it belongs to: name it (--base, or "
            "base=... in Python)."
        )
    places = [Path(name).expanduser()]
    if beside is not None:
        places.append((adapter.path / beside).resolve())
    for place in places:
        if place.is_dir():
            return str(place), "main"
    if not _looks_like_hub_name(name):
        listed = " nor ".join(str(place.absolute()) for place in places)
        raise ModelNotFoundError(
            f"The base model of {adapter.path} is not at {listed}: it was moved, or the adapter "
            "comes from another machine. Give the base's folder or Hub name (--base, or base=... "
            "in Python)."
        )
    revision = adapter.config.revision
    return name, revision if isinstance(revision, str) and revision else "main"


def _looks_like_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name) is not None and not name.startswith(".")


# ---- settings -----------------------------------------------------------------------------------


def read_adapter_config(path: Path, tensors: Mapping[str, torch.Tensor]) -> LoraConfig:
    """The settings in an adapter's folder, which has these tensors.

    Raises:
        AdapterVerificationError: a setting is nonsense.
        UnsupportedAdapterError: it is not LoRA, or has settings that are not honoured here.
    """
    raw = {
        key: value
        for key, value in read_json_object(path, CONFIG_FILE).items()
        if value is not None and key not in ("runtime_config", "auto_mapping", "inference_mode")
    }
    where = f"{path / CONFIG_FILE}"
    if raw.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(
            f"{where}: the adapter's type is {raw.get('peft_type')!r}; only LORA is supported."
        )
    for key in _REACHING_OUT:
        if raw.get(key):
            raise UnsupportedAdapterError(
                f"{where}: {key} is set, with which PEFT would read other files, import modules or "
                "multiply layers: it is not loaded."
            )
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(key for key in raw.keys() - known if raw[key] not in (False, [], {})):
        raise UnsupportedAdapterError(
            f"{where}: this PEFT does not know {', '.join(unknown)}: update peft."
        )
    _check_types(raw, where)
    _defuse_patterns(raw, tensors, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about settings that have no effect
            return LoraConfig(**{key: value for key, value in raw.items() if key in known})
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedAdapterError(f"{where}: PEFT refuses it: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_RANK


def _is_names(value: object) -> bool:
    listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) or listed


def _is_layers(value: object) -> bool:
    """A whole number or a list of them."""
    listed = value if isinstance(value, list) else [value]
    return all(isinstance(item, int) and not isinstance(item, bool) for item in listed)


def _maps_to(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, f"a whole number from 1 to {_LARGEST_RANK}"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_share, "from 0 to 1"),
    "target_modules": (_is_names, "names"),
    "exclude_modules": (_is_names, "names"),
    "modules_to_save": (_is_names, "names"),
    "layers_pattern": (_is_names, "names"),
    "layers_to_transform": (_is_layers, "layer numbers"),
    "alora_invocation_tokens": (_is_layers, "token ids"),
    "rank_pattern": (_maps_to(_is_rank), "names with ranks"),
    "alpha_pattern": (_maps_to(_is_number), "names with numbers"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a text"),
    "revision": (lambda value: isinstance(value, str), "a text"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
} | {
    name: (lambda value: isinstance(value, bool), "true or false")
    for name in ("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "lora_bias")
}


def _check_types(raw: Mapping[str, Any], where: str) -> None:
    for key, (check, wanted) in _TYPES.items():
        if key in raw and not check(raw[key]):
            raise AdapterVerificationError(
                f"{where}: {key} is {str(raw[key])[:80]!r}; it must be {wanted}."
            )


def _defuse_patterns(raw: dict[str, Any], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Keep regular expressions that could take forever from PEFT.

    Which modules are adapted can be read off the tensors instead.
    """
    targets = raw.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear" and not _is_harmless(targets):
        raw["target_modules"] = _adapted_modules(tensors)
        raw.pop("exclude_modules", None)
    patterns = [*raw.get("rank_pattern", {}), *raw.get("alpha_pattern", {})]
    for key in ("exclude_modules", "layers_pattern"):
        value = raw.get(key, [])
        patterns += [value] if isinstance(value, str) else value if key != "exclude_modules" else []
    for pattern in patterns:
        if not _is_harmless(pattern):
            raise UnsupportedAdapterError(
                f"{where}: the pattern {pattern[:80]!r} might take forever to match: write the "
                "names out."
            )


def _is_harmless(pattern: str) -> bool:
    wildcards = pattern.count("*") + pattern.count("+")
    if len(pattern) > 500 or wildcards > _MOST_WILDCARDS:
        return False
    return _HARMLESS_PATTERN.fullmatch(pattern) is not None


def _adapted_modules(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    names = {re.sub(r"\.lora_[A-Za-z_]+.*$", "", name) for name in tensors if ".lora_" in name}
    return sorted(name.removeprefix("base_model.model.") for name in names)
