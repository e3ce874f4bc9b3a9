"""What a subclass may override and an owner may assign of the Trainer, and what nobody would call.

Packed sequences of a task's examples take the place of batches of tensors, so some of the Trainer's
methods are never called here. One that is overridden is refused by name, and so is a function that
is assigned, because the default would train without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from lora_fsdp.errors import ArgumentError, did_you_mean

logger = logging.getLogger(__name__)

_OBJECTIVE = "give a loss as LoraTrainer(objective=...), see docs/architecture.md"
_METRICS = "compute metrics in Task.compute_metrics, see docs/tasks.md"
_ORDER = "set --data_seed, or override get_train_dataloader"
_EXAMPLES = "make examples in Task.build_prompt and Task.build_target, see docs/tasks.md"
_PRECISION = "set --bf16, or mixed_precision in the accelerate YAML"
_SAVING = "override save_model, or add a callback with on_save"
_SHARDS = "set FSDP in the accelerate YAML"
SEARCH = "start a run for each trial, each in its own --output_dir"
_NOTHING = "remove it"
_OPEN = (
    "give model=lora_fsdp.base.streaming.open_base(ModelArguments(path{}), device=args.device, "
    "peft_config=...)"
)
_OPTIMIZER = "give optimizer_cls_and_kwargs=(a class, its keyword arguments)"

#: Methods of the Trainer that a run never calls, and what to use instead.
UNUSED_METHODS = {
    "_defer_fsdp_gradient_reduction": _SHARDS,
    "_get_collator_with_removed_columns": _EXAMPLES,
    "_get_dataloader": "override get_train_dataloader and get_eval_dataloader",
    "_get_eval_sampler": "override get_eval_dataloader",
    "_get_num_items_in_batch": f"count in Objective.count; {_OBJECTIVE}",
    "_get_train_sampler": _ORDER,
    "_has_mixed_mesh_grads": _SHARDS,
    "_issue_warnings_after_load": _NOTHING,
    "_mixed_mesh_grad_norm": _SHARDS,
    "_prepare_context_parallel_inputs": _SHARDS,
    "_prepare_input": f"lay examples out in Objective.tree; {_OBJECTIVE}",
    "_prepare_inputs": f"lay examples out in Objective.tree; {_OBJECTIVE}",
    "_remove_unused_columns": _EXAMPLES,
    "_save": _SAVING,
    "_save_optimizer_and_scheduler": _SAVING,
    "_save_rng_state": _SAVING,
    "_save_scaler": _SAVING,
    "_set_signature_columns_if_needed": _EXAMPLES,
    "_sync_replicated_trainable_parameters": _SHARDS,
    "_tune_save_checkpoint": SEARCH,
    "_update_auto_batch_size": "set --max_tokens_per_row",
    "autocast_smart_context_manager": _PRECISION,
    "call_model_init": SEARCH,
    "compute_loss": _OBJECTIVE,
    "compute_loss_context_manager": _PRECISION,
    "create_optimizer_and_scheduler": "override create_optimizer and create_scheduler",
    "prediction_step": _METRICS,
}

#: What is assigned to a trainer and not read by a run, and what to use instead.
UNUSED_ATTRIBUTES = {
    "compute_loss_func": _OBJECTIVE,
    "compute_metrics": _METRICS,
    "data_collator": f"lay examples out in Objective.tree; {_OBJECTIVE}",
    "label_names": _EXAMPLES,
    "label_smoother": _OBJECTIVE,
    "model_init": SEARCH,
    "neftune_noise_alpha": _NOTHING,
    "preprocess_logits_for_metrics": _METRICS,
}

#: Arguments of `transformers.Trainer` and `trl.SFTTrainer`, of older versions too, that a run does
#: not use, and what to use instead.
UNUSED_ARGUMENTS = {
    "compute_loss_func": _OBJECTIVE,
    "compute_metrics": _METRICS,
    "data_collator": f"lay examples out in Objective.tree; {_OBJECTIVE}",
    "dataset_kwargs": _EXAMPLES,
    "dataset_num_proc": _NOTHING,
    "dataset_text_field": "name the column of the task (text_column=)",
    "eval_packing": _NOTHING,
    "formatting_func": _EXAMPLES,
    "max_seq_length": "it is called max_length here",
    "model_init": SEARCH,
    "model_init_kwargs": _OPEN.format(""),
    "optimizers": f"{_OPTIMIZER}, or override create_optimizer and create_scheduler",
    "packing": "it is a setting of args (FineTuningArguments)",
    "preprocess_logits_for_metrics": _METRICS,
    "quantization_config": _OPEN.format(", load_in_4bit=True"),
    "tokenizer": "it is called processing_class here",
}


def refuse_unused_arguments(
    positional: Sequence[object], given: Mapping[str, object], *, known: Collection[str]
) -> None:
    """Refuse arguments that `LoraTrainer` has not got.

    Args:
        positional: after `model` and `args`.
        given: by name.
        known: names of those that it has.

    Raises:
        ArgumentError: names one, and what to use instead.
    """
    if positional:
        raise ArgumentError(
            "LoraTrainer takes model and args by their place and all others by their name, such "
            "as train_dataset=..."
        )
    for name, value in given.items():
        if name not in UNUSED_ARGUMENTS:
            hint = did_you_mean(name, known)
            raise ArgumentError(f"LoraTrainer has no argument {name!r}.{hint}")
        if not (value is None or (isinstance(value, tuple) and value == (None, None))):
            raise ArgumentError(
                f"LoraTrainer(..., {name}=...) would not be used: it trains on packed sequences of "
                f"a task's examples. Instead, {UNUSED_ARGUMENTS[name]}."
            )


def refuse_unused_overrides(kind: type[Trainer], *, base: type[Trainer]) -> None:
    """Refuse a subclass of `base` that overrides a method which is never called.

    Raises:
        ArgumentError: names the method and what to use instead.
    """
    for name, instead in UNUSED_METHODS.items():
        if getattr(kind, name, None) is not getattr(base, name, None) and hasattr(base, name):
            raise ArgumentError(
                f"{kind.__name__}.{name} would never be called: LoraTrainer trains on packed "
                f"sequences of a task's examples. Instead, {instead}."
            )


def assigned_by_default(trainer: Trainer) -> dict[str, Any]:
    """What the Trainer itself assigns where an owner could."""
    return {name: getattr(trainer, name, None) for name in UNUSED_ATTRIBUTES}


def refuse_unused_assignments(trainer: Trainer, *, by_default: dict[str, Any]) -> None:
    """Refuse a function that was assigned to a trainer and would never be called.

    Raises:
        ArgumentError: names it and what to use instead.
    """
    unused = {name: UNUSED_METHODS[name] for name in vars(trainer) if name in UNUSED_METHODS}
    for name, value in by_default.items():
        if getattr(trainer, name, None) is not value:
            unused[name] = UNUSED_ATTRIBUTES[name]
    for name, instead in unused.items():
        raise ArgumentError(
            f"{type(trainer).__name__}.{name} was assigned, and a run would not use it: "
            f"LoraTrainer trains on packed sequences of a task's examples. Instead, {instead}."
        )


def warn_of_unused_events(callbacks: Sequence[TrainerCallback], *, accumulation: int) -> None:
    """Say that no callback hears of the parts of a step: accumulation is folded into it."""
    for callback in callbacks:
        overridden = type(callback).on_substep_end is not TrainerCallback.on_substep_end
        if accumulation > 1 and overridden:
            logger.warning(
                "%s.on_substep_end is never called: the %d accumulated batches of a step are "
                "packed together and computed as one. Use on_step_end.",
                type(callback).__name__,
                accumulation,
            )
