"""Of `transformers.TrainingArguments`: what a run cannot honour, and what does not concern it."""

from __future__ import annotations

from dataclasses import MISSING, asdict
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from lora_fsdp.errors import ArgumentError

_PACKED = "has no effect on packed sequences"
_SCORED = "has no effect on evaluation, which scores a task's answers"
_TASKS_METRICS = f"{_SCORED} and computes Task.compute_metrics"
_LAYERS = "has no effect on the layers, whose forward is chosen by --step"
_ORDER = "would change the order of examples, which a resumed run must repeat"

_EMPTY: tuple[Any, ...] = (None, "", [], {})

#: Refused where they are set: what the setting would do, or why it cannot.
REFUSED = {
    "auto_find_batch_size": _PACKED,
    "average_tokens_across_devices": "has no effect: label tokens are counted over all processes",
    "batch_eval_metrics": _TASKS_METRICS,
    "bf16_full_eval": f"{_SCORED} in the dtype of training (--dtype)",
    "dataloader_drop_last": _PACKED,
    "dataloader_in_order": _ORDER,
    "dataloader_persistent_workers": _ORDER,
    "debug": "is not supported: a run stops by itself at the first step that is not finite",
    "enable_jit_checkpoint": "is not needed: a run always saves a checkpoint on SIGTERM",
    "eval_do_concat_batches": _SCORED,
    "eval_use_gather_object": _SCORED,
    "fp16_full_eval": f"{_SCORED} in the dtype of training (--dtype)",
    "include_for_metrics": _TASKS_METRICS,
    "include_num_input_tokens_seen": _PACKED,
    "label_names": "has no effect: a task names its label column (--label_column)",
    "length_column_name": _PACKED,
    "liger_kernel_config": _LAYERS,
    "neftune_noise_alpha": _PACKED,
    "optim_target_modules": "chooses among the base's weights, which are frozen",
    "parallelism_config": "is not supported: FSDP is configured by an accelerate YAML",
    "prediction_loss_only": _SCORED,
    "torch_compile": _PACKED,
    "torch_compile_backend": _PACKED,
    "torch_compile_mode": _PACKED,
    "torch_empty_cache_steps": _PACKED,
    "train_sampling_strategy": _PACKED,
    "use_liger_kernel": _LAYERS,
}

#: Without effect where they are set, which is said: nothing is lost by it.
WITHOUT_EFFECT = {
    "ddp_broadcast_buffers": "no DDP is used; gradients are summed in one all-reduce",
    "ddp_bucket_cap_mb": "no DDP is used; gradients are summed in one all-reduce",
    "ddp_find_unused_parameters": "no DDP is used; gradients are summed in one all-reduce",
    "ddp_static_graph": "no DDP is used; gradients are summed in one all-reduce",
    "do_predict": "it is for scripts; `lora-fsdp predict` answers a table",
    "eval_accumulation_steps": "scores are small and are brought to the CPU at once",
    "per_device_eval_batch_size": "held-out examples are packed as --max_tokens_per_row says",
    "remove_unused_columns": "a task reads the columns that it names, and no others",
}


def check_trainer_settings(arguments: TrainingArguments) -> list[str]:
    """Refuse settings that cannot be honoured; a sentence for each that is without effect.

    Raises:
        ArgumentError: names the setting, and says why.
    """
    for name, reason in REFUSED.items():
        if _is_set(arguments, name):
            raise ArgumentError(f"--{name} {reason}: remove it.")
    _check_accelerator_config(arguments)
    return [
        f"--{name} has no effect here: {why}."
        for name, why in WITHOUT_EFFECT.items()
        if _is_set(arguments, name)
    ]


def _is_set(arguments: TrainingArguments, name: str) -> bool:
    field = TrainingArguments.__dataclass_fields__.get(name)
    if field is None:  # not every version has every setting
        return False
    default = field.default if field.default_factory is MISSING else field.default_factory()
    value = getattr(arguments, name)
    # Some are `None` or "" by default and become an empty list.
    return bool(value != default and not (value in _EMPTY and default in _EMPTY))


def _check_accelerator_config(arguments: TrainingArguments) -> None:
    default = asdict(AcceleratorConfig())
    for key, value in _as_dict(arguments.accelerator_config).items():
        if key != "use_configured_state" and value != default.get(key):
            raise ArgumentError(
                f"--accelerator_config {key} {_PACKED}, which are divided among the processes "
                "without accelerate: remove it."
            )


def _as_dict(config: Any) -> dict[str, Any]:
    return asdict(config) if isinstance(config, AcceleratorConfig) else dict(config or {})
