"""What a run can be told, beyond what upstream's own argument classes already say.

`OptionParser` turns these dataclasses into command-line options and recipe keys
(`--config recipe.yaml`). `peft.LoraConfig`, `transformers.TrainingArguments` and the accelerate
YAML stay the only place for what they say; `LoraArguments.lora_kwargs` reaches the whole of the
first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_fsdp.arguments.adapter import LoraArguments
from lora_fsdp.arguments.data import DataArguments
from lora_fsdp.arguments.model import ModelArguments

if TYPE_CHECKING:
    from lora_fsdp.arguments.training import FineTuningArguments

__all__ = ["DataArguments", "FineTuningArguments", "LoraArguments", "ModelArguments"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: torch and transformers take seconds, and a help text needs
    # neither.
    if name == "FineTuningArguments":
        from lora_fsdp.arguments.training import FineTuningArguments

        return FineTuningArguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
