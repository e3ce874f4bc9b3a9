"""Launches and settings that cannot work, refused before the base is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peft import PeftModel

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.unusable import unusable_weight
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.distributed.launch import check_launch
from lora_fsdp.errors import ArgumentError, UnsupportedModelError
from lora_fsdp.placement.sequences import check_sequence_length
from lora_fsdp.ranks import from_every_rank
from lora_fsdp.training.step.objectives.objective import Objective


def check_arguments(
    args: FineTuningArguments, settings: FsdpSettings | None, *, max_length: int
) -> None:
    """Refuse a launch that is not as it was asked for, and settings that contradict each other.

    Raises:
        LaunchError: the ranks did not get what the accelerate YAML asked for.
        ArgumentError: names the keys and what to do.
    """
    check_launch(args, settings, allow_one_process=args.allow_fsdp_on_one_process)
    check_checkpointing(args, settings)
    check_sequence_length(args.max_tokens_per_row, max_length=max_length)


def check_checkpointing(args: FineTuningArguments, settings: FsdpSettings | None) -> None:
    """Refuse to recompute activations twice.

    Raises:
        ArgumentError: names both keys.
    """
    if args.gradient_checkpointing and settings is not None and settings.activation_checkpointing:
        raise ArgumentError(
            "Both --gradient_checkpointing and the YAML's fsdp_activation_checkpointing are set, "
            "which would recompute everything twice: keep one."
        )


def check_targets(examples: Sequence[EncodedExample]) -> None:
    """Refuse training examples without an answer, or with a weight that counts nothing."""
    for example in examples:
        if not example.target_ids:
            raise ArgumentError(f"Row {example.row} has no target: it cannot be trained on.")
        weight = example.example.weight
        if not (math.isfinite(weight) and weight > 0):
            raise ArgumentError(
                f"Row {example.row} has the weight {weight}: leave it out, or give it one above 0."
            )


def check_reference(objective: Objective, model: PeftModel) -> None:
    """Refuse an objective that asks the frozen base where the adapter's start has changed that.

    Raises:
        ArgumentError: names the setting.
    """
    start = model.peft_config[str(model.active_adapter)].init_lora_weights  # type: ignore[attr-defined]
    if objective.needs_reference and start not in _STARTS_BESIDE_THE_BASE:
        raise ArgumentError(
            f"{type(objective).__name__} compares with the base, which init_lora_weights {start!r} "
            "changes when the adapter is attached: leave it out of lora_kwargs."
        )


# Of an adapter that adds nothing at first; others (PiSSA, OLoRA) take their start out of the base.
_STARTS_BESIDE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


def check_weights(model: PeftModel) -> None:
    """Refuse weights with which nothing can be computed: a collective call.

    Raises:
        UnsupportedModelError: names the weight that is not finite, or too large.
    """
    found = [text for text in from_every_rank(unusable_weight(base_model(model))) if text]
    if found:
        raise UnsupportedModelError(
            f"{type(base_model(model)).__name__} cannot be trained: {found[0]}."
        )
