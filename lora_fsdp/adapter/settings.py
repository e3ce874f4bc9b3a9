"""Which settings of `peft.LoraConfig` are carried out here; all others are refused by name."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers.pytorch_utils import Conv1D

from lora_fsdp.adapter.folder import AdapterFolder, load_with_peft, read_adapter_config
from lora_fsdp.adapter.saved import adapter_state
from lora_fsdp.base.layers import base_model
from lora_fsdp.errors import ArgumentError, LoraFsdpError

#: Ways to begin after which PEFT loads the adapter as it was trained.
STARTS = (True, False, "gaussian", "orthogonal", "olora", "pissa")
#: Of these, those that take a part out of the base, which is taken out again at every loading.
STARTS_FROM_BASE = ("olora", "pissa")
#: Settings that are carried out.
CARRIED_OUT = frozenset(
    {
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out",
        "bias", "use_rslora", "use_dora", "lora_bias", "modules_to_save", "init_lora_weights",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        "trainable_token_indices", "target_parameters", "use_bdlora", "ensure_weight_tying",
    }
)  # fmt: skip
_BOOKKEEPING = "PEFT writes it when it saves: leave it out"
_NEEDS_DATA = "it belongs to a start that needs a pass over data before training"
#: Why the others are not.
REFUSED = {
    "peft_type": "only LORA is trained here",
    "task_type": "only CAUSAL_LM is trained here",
    "auto_mapping": _BOOKKEEPING,
    "peft_version": _BOOKKEEPING,
    "base_model_name_or_path": "--model_name_or_path names the base",
    "revision": "--model_revision names the base's revision",
    "inference_mode": "an adapter that is frozen cannot be trained",
    "megatron_config": "the base does not run under Megatron",
    "megatron_core": "the base does not run under Megatron",
    "loftq_config": "the base is not quantised by LoftQ: use --load_in_4bit",
    "eva_config": _NEEDS_DATA,
    "corda_config": _NEEDS_DATA,
    "lora_ga_config": _NEEDS_DATA,
    "velora_config": "PEFT does not save all of its weights",
    "monteclora_config": "PEFT does not save all of its weights, and its loss is not computed",
    "kasa_config": "its losses (beta, gamma) are not computed",
    "arrow_config": "it routes between adapters that are there already",
    "alora_invocation_tokens": "a packed sequence would switch it on for all of its examples",
    "use_qalora": "it has no effect but on bases quantised by GPTQ",
    "qalora_group_size": "it has no effect but on bases quantised by GPTQ",
    "layer_replication": "the adapter would be for another model than the base",
    "runtime_config": "the adapter's start is computed where the base is loaded",
}
_PLAIN = {"use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"}
_NAMES = {"modules_to_save", "target_parameters"}


def check_given(given: Mapping[str, Any]) -> None:
    """Refuse keys of `lora_kwargs` that PEFT would take and not carry out.

    Raises:
        ArgumentError: names key and value, and why.
    """
    _check_start(given.get("init_lora_weights", True))
    defaults = _defaults()
    allowed = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM",)}
    for key, value in given.items():
        if key not in defaults or key in CARRIED_OUT:
            continue
        if value != defaults[key] and value not in allowed.get(key, ()):
            raise ArgumentError(f"lora_kwargs: {key} {value!r} is refused: {_reason(key)}.")


def check_settings(config: PeftConfig) -> None:
    """Refuse an adapter's settings that would not be carried out exactly.

    Raises:
        ArgumentError: names key and value, and what is wrong.
    """
    if not isinstance(config, LoraConfig) or str(_plain(config.peft_type)) != "LORA":
        kind = _plain(getattr(config, "peft_type", type(config).__name__))
        raise ArgumentError(f"The adapter is of type {kind}: {REFUSED['peft_type']}.")
    defaults = _defaults()
    ours = {"peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision"}
    if _plain(config.task_type) not in (None, "CAUSAL_LM"):
        raise ArgumentError(
            f"task_type {_plain(config.task_type)!r} is refused: {REFUSED['task_type']}."
        )
    _check_start(config.init_lora_weights)
    ranks = (config.r, *(config.rank_pattern or {}).values())
    if config.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
        raise ArgumentError("init_lora_weights orthogonal needs even ranks: set --lora_r so.")
    for key, default in defaults.items():
        value = getattr(config, key)
        if key not in CARRIED_OUT | ours and value != default:
            raise ArgumentError(f"The adapter's {key} {value!r} is refused: {_reason(key)}.")
    if wrong := next(_wrong_types(config), None):
        raise ArgumentError(f"The adapter's {wrong}.")


def check_carried_out(model: PeftModel, config: LoraConfig) -> None:
    """Refuse settings that name parts which the model, to which they were attached, has not got.

    Raises:
        ArgumentError: names key and part.
    """
    adapted = [*model.targeted_module_names, *model.targeted_parameter_names]
    base = base_model(model)
    if config.init_lora_weights == "olora" and any(isinstance(m, Conv1D) for m in base.modules()):
        raise ArgumentError(
            f"init_lora_weights olora does not fit {type(base).__name__}, whose weights are "
            "transposed: use pissa."
        )
    if config.init_lora_weights in STARTS_FROM_BASE and not base.name_or_path:
        raise ArgumentError(
            f"init_lora_weights {config.init_lora_weights} needs a base that lies in a folder or "
            "on the Hub: the saved adapter could not be proved without it."
        )
    modules = [name for name, _ in base.named_modules()]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key) or ():
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise ArgumentError(f"{key}: {pattern!r} matches nothing that has an adapter.")
    for name in config.modules_to_save or ():
        if not any(f".{module}".endswith(f".{name}.modules_to_save") for module in modules):
            raise ArgumentError(f"modules_to_save: the model has no module {name!r}.")
    for name in config.exclude_modules if isinstance(config.exclude_modules, set) else ():
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            raise ArgumentError(f"exclude_modules: the model has no module {name!r}.")
    for name in config.target_parameters or ():
        if not any(f".{one}".endswith(f".{name}") for one in model.targeted_parameter_names):
            raise ArgumentError(f"target_parameters: the model has no parameter {name!r}.")
    layers = config.layers_to_transform
    there = {int(n) for name in adapted for n in re.findall(r"\.(\d+)\.", name)}
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if layer not in there:
            raise ArgumentError(f"layers_to_transform: no module of a layer {layer} is adapted.")


def check_can_be_saved(model: PeftModel, config: LoraConfig) -> None:
    """Refuse an adapter that could not be loaded again, on a copy without numbers.

    Raises:
        ArgumentError: says what PEFT or the reader of folders would refuse at the end of the run.
    """
    try:
        state = adapter_state(model)
        tensors = {name: torch.empty_like(one, device="meta") for name, one in state.items()}
        # The copy draws numbers that the run must not miss.
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            read = read_adapter_config(Path(folder), tensors)
            load_with_peft(AdapterFolder(Path(folder), read, tensors), base_model(model))
    except (LoraFsdpError, KeyError) as error:
        raise ArgumentError(
            f"An adapter with these settings could not be loaded again when it is saved: {error}"
        ) from error


def _check_start(start: object) -> None:
    if not any(start is one or (isinstance(one, str) and start == one) for one in STARTS):
        why = {
            "eva": "it needs a pass over data before training",
            "corda": "it needs a pass over data before training",
            "lora_ga": "it needs a pass over data before training",
            "loftq": "the base is not quantised by LoftQ: use --load_in_4bit",
            "mica": "it freezes a half of the adapter",
        }.get(str(start), "it is not known here")
        if str(start).startswith("pissa_niter"):
            why = "it is drawn at random, and so differs whenever the adapter is loaded: use pissa"
        known = ", ".join(map(str, STARTS))
        raise ArgumentError(
            f"The adapter's init_lora_weights {start!r} is refused: {why}. Give one of {known}."
        )


def _wrong_types(config: LoraConfig) -> Iterator[str]:
    rank: object = config.r
    if not isinstance(rank, int):
        yield f"r must be a whole number, not {config.r!r}"
    for key in _PLAIN:
        if not isinstance(getattr(config, key), bool):
            yield f"{key} must be true or false, not {getattr(config, key)!r}"
    if config.bias not in ("none", "all", "lora_only"):
        yield f"bias must be none, all or lora_only, not {config.bias!r}"
    for key in _NAMES:
        value = getattr(config, key)
        if value and not (
            isinstance(value, list | set | tuple) and all(isinstance(one, str) for one in value)
        ):
            yield f"{key} must be a list of names, not {value!r}"
    layers = config.layers_to_transform
    listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in listed):
        yield f"layers_to_transform must be layer numbers, not {layers!r}"
    tokens = config.trainable_token_indices or []
    for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            yield f"trainable_token_indices must be token ids, not {indices!r}"
    for pattern in [config.exclude_modules] if isinstance(config.exclude_modules, str) else []:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"exclude_modules {pattern!r} is no regular expression ({error}): give a list"


def _defaults() -> dict[str, Any]:
    """The default of every key of the installed `LoraConfig`."""
    made = LoraConfig()
    own = {one.name: one.default for one in fields(LoraConfig)}
    return {
        name: getattr(made, name) if default is MISSING else default
        for name, default in own.items()
    }


def _reason(key: str) -> str:
    return REFUSED.get(key, "this version of lora-fsdp does not know it")


def _plain(value: Any) -> Any:
    """An enumeration's value, as JSON has it."""
    return getattr(value, "value", value)
