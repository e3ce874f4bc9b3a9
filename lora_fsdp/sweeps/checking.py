"""What a run of several adapters cannot be asked for, found before anything is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from transformers import get_scheduler

from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments
from lora_fsdp.doctor.numbers import impossible_numbers
from lora_fsdp.errors import ArgumentError, LoraFsdpError
from lora_fsdp.sweeps.grid import Asked, asked_adapters

# Schedules that look at the run's metrics, or not at all at the number of steps.
_ASKS_THE_RUN = ("reduce_lr_on_plateau", "greedy")


def check_several(training: FineTuningArguments, data: DataArguments, lora: LoraArguments) -> None:
    """Refuse what a run of several adapters cannot do, before anything is read.

    Raises:
        ArgumentError: names the options, or the setting of the grid.
    """
    check_contradictions(training, data)
    asked = asked_adapters(training)
    for one in {one.setting: one for one in reversed(asked)}.values():
        if (reason := _why_impossible(one, training, lora)) is not None:
            given = " ".join(f"{name}={value}" for name, value in one.values.items())
            raise ArgumentError(f"--grid {given}: {reason}" if given else reason)
    if lora.adapter_name_or_path is not None:
        raise ArgumentError(
            "--adapter_name_or_path goes on with one adapter, and several are to be trained: leave "
            "it out, or start a run for each."
        )


def check_contradictions(training: FineTuningArguments, data: DataArguments) -> None:
    """Refuse options that contradict each other.

    Raises:
        ArgumentError: names the options.
    """
    asked_adapters(training)
    if training.folds is not None and (training.seeds > 1 or training.grid is not None):
        raise ArgumentError("--folds goes with neither --seeds nor --grid: keep one of them.")
    if training.folds is not None:
        for name in ("eval_file", "test_file", "test_size"):
            if getattr(data, name) is not None:
                raise ArgumentError(
                    f"--folds holds every row out once, so that --{name} would be ignored: leave "
                    "one out."
                )
    if isinstance(training.resume_from_checkpoint, str):
        raise ArgumentError(
            "Several adapters go on from where each of them was: --resume_from_checkpoint true."
        )
    for name in ("push_to_hub", "max_hours", "untrained_shots"):
        if getattr(training, name):
            raise ArgumentError(f"--{name} is for a run of one adapter: leave it out.")


def _why_impossible(one: Asked, training: FineTuningArguments, lora: LoraArguments) -> str | None:
    """Why no run can have a setting, as far as that is known without a model."""
    for name, value in one.values.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} must be a finite number."
    own = one.arguments(training, Path(str(training.output_dir)))
    for name, number, wanted in impossible_numbers(own):
        return f"{name} {number} must be {wanted}."
    adapter = one.adapter(lora)
    try:
        config = lora_config(adapter)
        FineTuningArguments(output_dir=own.output_dir, **one.training_values)
        _try_optimizer(own)
    except (LoraFsdpError, ImportError, TypeError, ValueError) as error:  # upstream's own checks
        return " ".join(str(error).split())
    if config.r < 1:
        return f"lora_r {config.r} must be 1 or more."
    if not 0 <= config.lora_dropout < 1:
        return f"lora_dropout {config.lora_dropout} must be from 0 to less than 1."
    return None


def _try_optimizer(own: FineTuningArguments) -> None:
    """Make optimizer and schedule for one number, where they are PyTorch's own."""
    values = [torch.nn.Parameter(torch.zeros(1))]
    betas = (own.adam_beta1, own.adam_beta2)
    optimizer = torch.optim.AdamW(
        values,
        lr=own.learning_rate,
        betas=betas,
        eps=own.adam_epsilon,
        weight_decay=own.weight_decay,
    )
    if str(getattr(own.lr_scheduler_type, "value", own.lr_scheduler_type)) in _ASKS_THE_RUN:
        return
    get_scheduler(
        own.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=own.get_warmup_steps(100),
        num_training_steps=100,
        scheduler_specific_kwargs=cast(Any, own.lr_scheduler_kwargs),
    )
