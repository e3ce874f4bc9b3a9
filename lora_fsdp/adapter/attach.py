"""The LoRA adapter: its settings, and how it is attached to the base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.adapter.settings import (
    check_can_be_saved,
    check_carried_out,
    check_given,
    check_settings,
)
from lora_fsdp.arguments import LoraArguments
from lora_fsdp.base.streaming import StoredBase, needs_weights
from lora_fsdp.errors import ArgumentError, TargetModulesError

# What PEFT takes in any type, to fail when it computes with it.
_NUMBERS = ("r", "lora_alpha", "lora_dropout")
# What PEFT raises of settings that make no sense together, or for this model.
_PEFT_ERRORS = (
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def lora_config(arguments: LoraArguments, *, revision: str | None = None) -> LoraConfig:
    """The `peft.LoraConfig` that the arguments describe.

    Args:
        arguments: the adapter's settings.
        revision: of the base on the Hub, which the adapter is to remember; `None` = the main one.
    """
    targets: list[str] | str = arguments.lora_target_modules
    if targets == ["all-linear"]:  # PEFT knows this word only outside a list
        targets = "all-linear"
    settings = {
        "r": arguments.lora_r,
        "lora_alpha": arguments.lora_alpha,
        "lora_dropout": arguments.lora_dropout,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "revision": revision,
    }
    extra = cast(dict[str, Any], arguments.lora_kwargs or {})
    check_given(extra)
    try:
        config = LoraConfig(**{**settings, **extra})
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise ArgumentError(f"peft.LoraConfig refuses lora_kwargs {extra}: {error}") from error
    for name in _NUMBERS:
        value = getattr(config, name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ArgumentError(f"lora_kwargs: {name} must be a number, not {value!r}.")
    check_settings(config)
    return config


def attach_adapter(
    base: PreTrainedModel, config: LoraConfig, *, stored: StoredBase | None = None
) -> PeftModel:
    """Attach a new adapter to the frozen base: float32, whatever the base's dtype.

    Attach before sharding: an adapter attached afterwards would be a different one on every rank.

    Args:
        base: the base.
        config: the adapter's settings.
        stored: where the base's weights are, if it has not got them yet.

    Raises:
        TargetModulesError: a target module that matches nothing.
        ArgumentError: a setting would not be carried out, the adapter could not be saved, or its
            first values depend on weights that the base has not got.
    """
    check_settings(config)
    transposed = config.fan_in_fan_out
    _check_targets(base, config)
    if stored is not None and (reason := needs_weights(config)):
        raise ArgumentError(f"The base has no weights yet, but {reason}: load it with load_base.")
    try:
        with nullcontext() if stored is None else stored.stand_ins():
            model = get_peft_model(base, config, autocast_adapter_dtype=True)
    except torch.OutOfMemoryError:
        raise
    except _PEFT_ERRORS as error:
        raise TargetModulesError(f"PEFT cannot adapt {type(base).__name__}: {error}") from error
    if transposed and not config.fan_in_fan_out:
        raise ArgumentError(
            f"fan_in_fan_out: the modules of {type(base).__name__} are not stored that way."
        )
    check_carried_out(model, config)
    check_can_be_saved(model, config)
    for parameter in trainable_parameters(model).values():  # also what PEFT copies from the base
        parameter.data = parameter.data.float()
    if base.name_or_path and Path(base.name_or_path).expanduser().is_dir():
        # A relative path would be lost on whoever loads the adapter from another folder.
        absolute = str(Path(base.name_or_path).expanduser().absolute())
        config.base_model_name_or_path, config.revision = absolute, None
    return model


def attach_adapters(
    base: PreTrainedModel,
    configs: Mapping[str, LoraConfig],
    *,
    seeds: Sequence[int],
    stored: StoredBase | None = None,
) -> PeftModel:
    """Attach several new adapters to one base, all of them trainable.

    Args:
        base: the base.
        configs: each adapter's settings by its name, the first one named "default".
        seeds: of each one's first values, which are those that it would have alone.
        stored: where the base's weights are, if it has not got them yet.

    Raises:
        TargetModulesError, ArgumentError: as `attach_adapter`.
    """
    (_, first), *others = configs.items()
    set_seed(seeds[0])
    model = attach_adapter(base, first, stored=stored)
    for (name, config), seed in zip(others, seeds[1:], strict=True):
        check_settings(config)
        _check_targets(base, config, adapted=model)
        config.base_model_name_or_path = first.base_model_name_or_path
        config.revision = first.revision
        set_seed(seed)
        try:
            with nullcontext() if stored is None else stored.stand_ins():
                model.add_adapter(name, config)
        except _PEFT_ERRORS as error:
            raise TargetModulesError(f"PEFT cannot adapt {type(base).__name__}: {error}") from error
    cast(LoraModel, model.base_model).set_adapter(list(configs))
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()
    return model


def has_dropout(model: PeftModel) -> bool:
    """Whether the adapter drops part of its input while it trains."""
    config = cast(LoraConfig, model.peft_config[str(model.active_adapter)])
    return bool(config.lora_dropout)


def _check_targets(
    base: PreTrainedModel, config: LoraConfig, *, adapted: PeftModel | None = None
) -> None:
    """`adapted` is the base with an adapter, whose layers PEFT has put in other modules."""
    names = [name for name, _ in base.named_modules() if name]
    if adapted is not None:
        names = [name.replace(".base_layer", "") for name in names]
    targets = config.target_modules
    if targets == "all-linear" or targets is None:
        return
    if isinstance(targets, str):  # to PEFT a plain string is a regular expression
        try:
            missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise TargetModulesError(
                f"LoRA target_modules {targets!r} is no regular expression ({error}), as which "
                "PEFT takes a plain string: give a list of names."
            ) from error
    else:
        missing = [t for t in sorted(targets) if not any(f".{n}".endswith(f".{t}") for n in names)]
    if missing:
        known = sorted(
            {
                name.rpartition(".")[2]
                for name, module in base.named_modules()
                if isinstance(module, nn.Linear | Conv1D)
            }
        )
        raise TargetModulesError(
            f"LoRA target modules {missing} match nothing in {type(base).__name__}. Its linear "
            f"modules are {known}; --lora_target_modules all-linear adapts all but the head."
        )
