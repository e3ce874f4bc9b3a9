"""The LoRA adapter: its settings, and how it is attached to the base."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from lora_fsdp.adapter.continuing import config_to_continue
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.adapter.settings import (
    check_can_be_saved,
    check_carried_out,
    check_given,
    check_settings,
)
from lora_fsdp.adapter.targets import resolve_targets
from lora_fsdp.arguments import LoraArguments
from lora_fsdp.base.experts.packed import add_lora_to_numbers
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
    """The `peft.LoraConfig` that the arguments describe, or that of the adapter to go on with.

    Args:
        arguments: the adapter's settings.
        revision: of the base on the Hub, which the adapter is to remember; `None` = the main one.
    """
    if arguments.adapter_name_or_path is not None:
        config = config_to_continue(arguments)
        config.revision = revision
        return config
    targets: list[str] | str | None = arguments.lora_target_modules
    if targets == ["all-linear"]:  # PEFT knows this word only outside a list
        targets = "all-linear"
    elif targets == ["auto"]:  # what suits the model, which is not known yet
        targets = None
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
    config.base_model_name_or_path = None  # settings may be attached anew; PEFT warns of that
    transposed = config.fan_in_fan_out
    resolve_targets(base, config)
    if stored is not None and (reason := needs_weights(config)):
        raise ArgumentError(f"The base has no weights yet, but {reason}: load it with load_base.")
    try:
        with (
            nullcontext() if stored is None else stored.stand_ins(),
            warnings.catch_warnings(),
        ):
            # PEFT compares patterns with modules only; `check_carried_out` with parameters too.
            warnings.filterwarnings(
                "ignore", "The following (rank|alpha)_pattern keys did not match"
            )
            model = get_peft_model(base, config, autocast_adapter_dtype=True)
    except torch.OutOfMemoryError:
        raise
    except _PEFT_ERRORS as error:
        raise TargetModulesError(f"PEFT cannot adapt {type(base).__name__}: {error}") from error
    add_lora_to_numbers(model)
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
    for config in configs.values():  # before PEFT puts the base's layers into other modules
        resolve_targets(base, config)
    (_, first), *others = configs.items()
    set_seed(seeds[0])
    model = attach_adapter(base, first, stored=stored)
    for (name, config), seed in zip(others, seeds[1:], strict=True):
        check_settings(config)
        config.base_model_name_or_path = first.base_model_name_or_path
        config.revision = first.revision
        set_seed(seed)
        try:
            with nullcontext() if stored is None else stored.stand_ins():
                model.add_adapter(name, config)
        except _PEFT_ERRORS as error:
            raise TargetModulesError(f"PEFT cannot adapt {type(base).__name__}: {error}") from error
    add_lora_to_numbers(model)
    cast(LoraModel, model.base_model).set_adapter(list(configs))
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()
    return model


def has_dropout(model: PeftModel) -> bool:
    """Whether the adapter drops part of its input while it trains."""
    config = cast(LoraConfig, model.peft_config[str(model.active_adapter)])
    return bool(config.lora_dropout)
