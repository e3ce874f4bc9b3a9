"""What a run asks for of its placement: arguments, the YAML, and what the model brings along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.dropout import dropout_settings
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.packing import PackingChoice, choose_packing


@dataclass(frozen=True)
class Request:
    """What is asked for, and what of the model limits the choice.

    Attributes:
        step: `auto`, or the step that is asked for.
        resident_layers: `auto`, `all`, `none` or a number.
        share_prefix: `auto`, `always` or `never`.
        packing: `auto`, `always` or `never`.
        why_apart: why examples cannot share a sequence, going by the architecture; `None` = they
            can.
        max_tokens_per_row: the longest packed sequence; `None` = by memory.
        gradient_checkpointing: recompute activations, asked for by the arguments.
        own_checkpointing: it is set how (`gradient_checkpointing_kwargs`).
        fsdp: the YAML's FSDP settings; `None` = no FSDP.
        quantized: the base's linear layers are stored in 4 bits.
        autocast: the forward runs under autocast (the YAML's `mixed_precision`).
        attention: the model's attention kernel, as transformers calls it.
        attention_dropout: whether the model drops attention weights.
        lora_dropout: whether LoRA drops part of its input.
        model_dropout: whether the model itself drops anything while it trains.
    """

    step: str = "auto"
    resident_layers: str = "auto"
    share_prefix: str = "auto"
    packing: str = "auto"
    why_apart: str | None = None
    max_tokens_per_row: int | None = None
    gradient_checkpointing: bool = False
    own_checkpointing: bool = False
    fsdp: FsdpSettings | None = None
    quantized: bool = False
    autocast: bool = False
    attention: str = "sdpa"
    attention_dropout: bool = False
    lora_dropout: bool = False
    model_dropout: bool = False

    @classmethod
    def of(
        cls,
        training: Mapping[str, Any],
        *,
        fsdp: FsdpSettings | None,
        quantized: bool,
        autocast: bool,
        config: PretrainedConfig,
        lora_dropout: bool,
        why_apart: str | None = None,
    ) -> Request:
        """Of a run with these values of `FineTuningArguments`, and its model's config."""
        return cls(
            step=training["step"],
            resident_layers=training["resident_layers"],
            share_prefix=training["share_prefix"],
            packing=training["packing"],
            why_apart=why_apart,
            max_tokens_per_row=training["max_tokens_per_row"],
            gradient_checkpointing=bool(training["gradient_checkpointing"]),
            own_checkpointing=bool(training["gradient_checkpointing_kwargs"]),
            fsdp=fsdp,
            quantized=quantized,
            autocast=autocast,
            attention=str(config._attn_implementation),
            attention_dropout=bool(getattr(config.get_text_config(), "attention_dropout", 0.0)),
            lora_dropout=lora_dropout,
            model_dropout=bool(dropout_settings(config)),
        )

    @property
    def packing_choice(self) -> PackingChoice:
        """Whether examples share a sequence, before the model is asked itself.

        Raises:
            ArgumentError: packing, or a shared prefix, was asked for and cannot be.
        """
        choice = choose_packing(self.packing, why_apart=self.why_apart)
        if choice.packing.is_apart and self.share_prefix == "always":
            raise ArgumentError(
                f"--share_prefix always: each example has a sequence of its own ({choice.reason}), "
                "and no prefix to share. Use --share_prefix auto."
            )
        return choice

    @property
    def shares_prefix(self) -> bool:
        """Whether packed sequences compute their prompts' common prefix once.

        With dropout, LoRA's or the model's, examples would share the prefix's dropout masks.
        """
        if self.packing_choice.packing.is_apart:
            return False
        if self.share_prefix == "auto":
            return not (self.lora_dropout or self.model_dropout)
        return self.share_prefix == "always"

    @property
    def recomputes(self) -> bool:
        """Whether recomputing activations is asked for."""
        return self.gradient_checkpointing or (
            self.fsdp is not None and self.fsdp.activation_checkpointing
        )

    @property
    def why_not_fused(self) -> str | None:
        """Why the model's own layers are to compute; `None` = fused ones may."""
        if self.step in ("eager", "compiled"):
            return f"--step {self.step}"
        if self.packing_choice.packing.is_apart:
            return "each example has a sequence of its own"
        if self.autocast:
            return "mixed_precision in the accelerate YAML"
        if self.attention != "sdpa":
            return f"{self.attention} attention was chosen"
        if self.attention_dropout:
            return "the model drops attention weights"
        return None
