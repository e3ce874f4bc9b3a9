"""Which base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lora_fsdp.arguments.option import option


@dataclass
class ModelArguments:
    """Which base model, and how it is loaded."""

    # The heading of these options in a help text.
    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = option("", "Model folder, or a name on the Hugging Face Hub.")
    model_revision: str = option("main", "Branch, tag or commit.")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "The frozen base's dtype; auto = bfloat16 on GPUs, float32 on CPUs."
    )
    load_in_4bit: bool = option(
        False, "Keep the frozen linear layers and experts in 4 bits (NF4); needs bitsandbytes."
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = option(
        "auto", "Attention kernel; auto = SDPA, or eager where a model has no SDPA."
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model. Off unless asked."
    )
