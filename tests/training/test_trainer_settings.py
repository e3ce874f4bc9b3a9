"""Every field of the installed `TrainingArguments`: honoured, refused, or without effect and why.

Run: python -m pytest tests/training/test_trainer_settings.py
"""

import logging
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from lora_fsdp import FineTuningArguments
from lora_fsdp.arguments.trainer_settings import REFUSED, WITHOUT_EFFECT
from lora_fsdp.errors import ArgumentError
from tests.support.runs import toy_trainer

# Carried out: by the Trainer's loop, which asks them, or by the parts that are named in its place.
HONOURED = set(
    [
        "output_dir",
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "gradient_accumulation_steps",
        "label_smoothing_factor",
        "max_grad_norm",
        "bf16",
        "tf32",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "use_cache",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_on_each_node",
        "logging_nan_inf_filter",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "save_only_model",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_on_each_node",
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "restore_callback_states_from_checkpoint",
        "full_determinism",
        "seed",
        "data_seed",
        "use_cpu",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "ddp_backend",
        "ddp_timeout",
        "skip_memory_metrics",
        "resume_from_checkpoint",
    ]
)
# Refused in `FineTuningArguments` itself, for a reason of their own.
REFUSED_BY_THEMSELVES = {"accelerator_config", "deepspeed", "fp16", "fsdp", "fsdp_config",
                         "ignore_data_skip"}  # fmt: skip
# For a script of one's own, or set by whoever starts the processes; the Trainer reads none of them.
FOR_SCRIPTS = {"do_eval", "do_train", "local_rank"}

NAMES = [field.name for field in fields(TrainingArguments) if field.init]

VALUES = {
    "average_tokens_across_devices": False,
    "dataloader_in_order": False,
    "dataloader_persistent_workers": True,
    "debug": "underflow_overflow",
    "eval_do_concat_batches": False,
    "include_for_metrics": ["loss"],
    "include_num_input_tokens_seen": "all",
    "label_names": ["answer"],
    "length_column_name": "tokens",
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "optim_target_modules": ["q_proj"],
    "parallelism_config": {"tp_size": 2},
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "torch_empty_cache_steps": 3,
    "train_sampling_strategy": "group_by_length",
    "ddp_bucket_cap_mb": 25,
    "ddp_find_unused_parameters": False,
    "eval_accumulation_steps": 2,
    "per_device_eval_batch_size": 3,
    "remove_unused_columns": False,
}


def test_every_field_is_in_one_list():
    lists = [HONOURED, set(REFUSED), set(WITHOUT_EFFECT), REFUSED_BY_THEMSELVES, FOR_SCRIPTS]
    listed = [name for names in lists for name in names]
    assert len(listed) == len(set(listed))
    assert set(NAMES) - set(listed) == set()


@pytest.mark.parametrize("name", [name for name in REFUSED if name in NAMES])
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, name, monkeypatch):
    value = VALUES.get(name, True)
    if name == "parallelism_config":
        from accelerate.parallelism_config import ParallelismConfig

        value = ParallelismConfig()
    with pytest.raises(ArgumentError, match=rf"--(torch_compile|{name}) .*remove it"):
        FineTuningArguments(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize("name", [name for name in WITHOUT_EFFECT if name in NAMES])
def test_what_is_without_effect_is_said(tmp_path, caplog, name):
    with caplog.at_level(logging.WARNING):
        FineTuningArguments(output_dir=str(tmp_path), **{name: VALUES.get(name, True)})
    assert f"--{name} has no effect here: " in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        {"split_batches": True},
        {"dispatch_batches": True},
        {"even_batches": False},
        {"use_seedable_sampler": False},
        {"non_blocking": True},
        {"gradient_accumulation_kwargs": {"num_steps": 2}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_the_accelerator_config_is_refused_by_key(tmp_path, config):
    with pytest.raises(ArgumentError, match=rf"--accelerator_config {next(iter(config))}"):
        FineTuningArguments(output_dir=str(tmp_path), accelerator_config=config)


def test_the_defaults_say_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        FineTuningArguments(output_dir=str(tmp_path))
    assert "has no effect" not in caplog.text


def test_the_data_loaders_workers_are_as_asked(tmp_path):
    workers = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3}
    loader = toy_trainer(
        tmp_path, dataloader_multiprocessing_context="fork", **workers
    ).get_train_dataloader()
    assert loader.prefetch_factor == 3
    assert loader.multiprocessing_context.get_start_method() == "fork"
