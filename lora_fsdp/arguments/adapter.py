"""The adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lora_fsdp.arguments.option import option
from lora_fsdp.errors import ArgumentError


@dataclass
class LoraArguments:
    """The adapter; names as in `trl.ModelConfig`, defaults as in the source article."""

    # The heading of these options in a help text.
    _argument_group_name: ClassVar[str] = "adapter"

    lora_r: int = option(8, "Rank of the update matrices.")
    lora_alpha: int = option(32, "The update is scaled by alpha / r.")
    lora_dropout: float = option(
        0.0, "Dropout before the adapter. At 0, packed sequences share their prefix exactly."
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "Module names to adapt, or all-linear; auto = q_proj and v_proj, or what "
            "stands in their place in the model's family."
        },
    )
    lora_kwargs: dict[str, Any] | str | None = option(
        None, "Other peft.LoraConfig fields, as JSON: '{\"use_dora\": true}'."
    )

    adapter_name_or_path: str | None = option(
        None,
        "Go on with a saved adapter: a folder. Its LoRA settings are taken from it, its base is "
        "proved to be this one, and the optimizer is new.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.lora_kwargs, str):
            self.lora_kwargs = parse_json_object("lora_kwargs", self.lora_kwargs)


def parse_json_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object that the option `name` was given.

    Raises:
        ArgumentError: it is none.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"--{name} is not valid JSON ({error}): {text!r}") from error
    if not isinstance(value, dict):
        raise ArgumentError(f"--{name} must be a JSON object, not {text!r}")
    return value
