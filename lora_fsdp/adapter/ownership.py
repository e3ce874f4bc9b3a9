"""Which parameter belongs to which adapter of a model."""

from __future__ import annotations

import re

from peft import LoraConfig, PeftModel
from torch import nn

from lora_fsdp.errors import ArgumentError

# PEFT's names for what it adds: `...lora_A.ADAPTER.weight`, `...modules_to_save.ADAPTER.bias`.
_OF_AN_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_\w+)\.([^.]+)(?:\.|$)")


def parameters_by_adapter(model: PeftModel) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of every adapter that is trained, by the adapter's name and their own.

    An adapter owns what PEFT added under its name, and the base's biases that PEFT trains for it
    (`bias` in its settings). An adapter of which nothing is trainable is left out.

    Raises:
        ArgumentError: a trainable parameter belongs to no adapter, or part of an adapter is frozen.
    """
    with_biases = [
        name
        for name, config in model.peft_config.items()
        if isinstance(config, LoraConfig) and config.bias != "none"
    ]
    owned: dict[str, dict[str, nn.Parameter]] = {name: {} for name in model.peft_config}
    for name, parameter in model.named_parameters():
        match = _OF_AN_ADAPTER.search(name)
        if match and match[1] in owned:
            owned[match[1]][name] = parameter
        elif parameter.requires_grad and with_biases and "bias" in name:
            owned[with_biases[0]][name] = parameter  # PEFT lets one adapter have biases
        elif parameter.requires_grad:
            raise ArgumentError(
                f"{name} is trainable and belongs to no adapter ({', '.join(owned)}): freeze it, "
                "or name its module in the adapter's modules_to_save."
            )
    trained = {
        adapter: parameters
        for adapter, parameters in owned.items()
        if any(parameter.requires_grad for parameter in parameters.values())
    }
    for adapter, parameters in trained.items():
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                raise ArgumentError(
                    f"{name} is frozen and belongs to the adapter {adapter!r}, which is trained: "
                    "an adapter is trained as a whole or not at all."
                )
    return trained


def trainable_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters of all adapters that are trained, by name (`parameters_by_adapter`)."""
    adapters = parameters_by_adapter(model).values()
    return {name: parameter for parameters in adapters for name, parameter in parameters.items()}
