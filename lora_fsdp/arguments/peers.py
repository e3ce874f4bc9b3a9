"""What other programs call our options, so that who comes from them is told the name here.

The names are those of TRL, Axolotl, LLaMA-Factory, Unsloth and torchtune, and such as people type
from memory. Where nothing here does what an option there does, a sentence says so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

#: For each of our options, the names that others have for it.
NAMES = {
    "accelerate_config": "config_file accelerate_config_file",
    "adapter_name_or_path": "adapter adapter_path adapter_dir lora_model_dir lora_path lora_model "
    "peft_model peft_model_id resume_adapter init_adapter adapter_checkpoint",
    "attn_implementation": "attention attn attn_impl flash_attn flash_attention flash_attn_2 "
    "flash_attention_2 use_flash_attn use_flash_attention use_flash_attention_2 sdp_attention",
    "chat_template": "template apply_chat_template chat_template_path use_chat_template",
    "data_file": "data data_dir data_path datafile dataset dataset_dir dataset_file dataset_name "
    "dataset_path datasets input_file train train_data train_data_file train_dataset train_file "
    "train_files train_path training_data training_file csv csv_file",
    "dtype": "bfloat16 compute_dtype model_dtype precision torch_dtype",
    "early_stopping_patience": "early_stop early_stopping early_stopping_rounds "
    "early_stopping_steps patience",
    "eval_file": "dev_file eval_data eval_data_file eval_dataset eval_path val val_data "
    "val_dataset val_file val_path valid valid_data valid_file validation validation_data "
    "validation_dataset validation_file dataset_validation",
    "eval_size": "eval_fraction eval_ratio eval_split val_fraction val_ratio val_set_size val_size "
    "val_split validation_fraction validation_ratio validation_size validation_split "
    "validation_split_percentage",
    "eval_steps": "eval_every eval_every_n_steps eval_freq eval_frequency eval_interval "
    "run_val_every_n_steps steps_per_eval val_check_interval val_every",
    "eval_strategy": "evaluation_strategy",
    "gradient_accumulation_steps": "accum_steps accumulate_grad_batches accumulation_steps "
    "grad_accum grad_accum_steps grad_accumulation gradient_accumulation "
    "num_gradient_accumulation_steps",
    "gradient_checkpointing": "enable_activation_checkpointing enable_gradient_checkpointing "
    "grad_checkpoint grad_checkpointing recompute use_gradient_checkpointing",
    "instruction": "default_system prefix prompt prompt_template system system_message "
    "system_prompt task_prompt",
    "label_column": "answer_column completion_column field_output label_col label_field "
    "label_key output_column response_column target target_col target_column target_field y_column",
    "labels": "classes class_names label_names_list label_set",
    "learning_rate": "base_lr init_lr lr max_lr peak_lr peak_learning_rate",
    "load_in_4bit": "four_bit int4 nf4 q4 qlora quantize_4bit use_4bit use_qlora",
    "logging_steps": "log_every log_every_n_steps log_every_steps log_freq log_interval log_steps "
    "steps_per_print steps_per_report",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_kwargs": "additional_target lora_bias lora_modules_to_save lora_target_parameters "
    "lora_task_type modules_to_save peft_use_dora peft_use_rslora use_dora use_rslora",
    "lora_r": "lora_dim lora_rank r rank peft_r",
    "lora_target_modules": "lora_attn_modules lora_layers lora_modules lora_target "
    "lora_target_linear lora_targets peft_target_modules target_modules",
    "lr_scheduler_type": "learning_rate_schedule lr_decay_style lr_schedule lr_scheduler schedule "
    "scheduler scheduler_type",
    "main_process_port": "master_port port rdzv_port",
    "max_grad_norm": "clip_grad clip_grad_norm clip_norm grad_clip grad_norm_clip gradient_clip "
    "gradient_clip_val gradient_clipping max_norm",
    "max_length": "block_size context_length cutoff_len cutoff_length max_input_length max_len "
    "max_seq_len max_seq_length max_sequence_length model_max_length seq_len seq_length "
    "sequence_len sequence_length",
    "max_rows": "limit max_examples max_samples max_train_examples max_train_rows "
    "max_train_samples n_samples num_samples num_train_samples",
    "max_steps": "iterations iters max_iter max_iters max_train_steps num_iterations num_steps "
    "num_train_steps num_training_steps steps total_steps train_steps training_steps",
    "model_name_or_path": "base base_model base_model_id base_model_name base_model_name_or_path "
    "base_model_path checkpoint_dir model model_dir model_id model_name model_path model_repo "
    "pretrained pretrained_model pretrained_model_name pretrained_model_name_or_path "
    "pretrained_model_path",
    "model_revision": "base_model_revision revision revision_of_model",
    "num_processes": "gpus n_gpu n_gpus ngpus nproc nproc_per_node num_gpu num_gpus num_procs "
    "world_size",
    "num_train_epochs": "epoch epochs max_epochs n_epochs nb_epochs num_epoch num_epochs "
    "num_training_epochs total_epochs train_epochs",
    "optim": "optimizer optimizer_name optimizer_type",
    "output_dir": "checkpoint_path experiment_dir out out_dir output output_folder output_path "
    "save_dir save_folder save_path save_to",
    "per_device_train_batch_size": "batch batch_size batch_size_training bs device_batch_size mbs "
    "micro_batch micro_batch_size per_device_batch_size per_device_bs per_gpu_batch_size "
    "per_gpu_train_batch_size train_batch_size train_bs train_micro_batch_size_per_gpu",
    "report_to": "log_with logger tracker use_mlflow use_tensorboard use_wandb wandb",
    "resume_from_checkpoint": "auto_resume auto_resume_from_checkpoints checkpoint continue_from "
    "load_checkpoint resume resume_from restart_from",
    "save_steps": "checkpoint_every checkpoint_interval checkpointing_steps save_every "
    "save_every_n_steps save_every_steps save_freq save_interval steps_per_save",
    "save_strategy": "checkpointing_strategy saving_strategy",
    "save_total_limit": "checkpoints_total_limit keep_checkpoints keep_last_n_checkpoints "
    "max_checkpoints num_checkpoints",
    "seed": "manual_seed random_seed random_state rng_seed",
    "task_options": "field_instruction task_args task_kwargs",
    "text_column": "dataset_text_field field_input input_column input_field prompt_column "
    "question_column sentence_column text_col text_field text_key x_column",
    "warmup_steps": "lr_warmup_steps n_warmup_steps num_warmup_steps warmup warmup_iters",
    "weight_decay": "decay wd",
}
_ANSWER_ONLY = "is not needed: the loss is over the answers alone"
_PACKED = "is not needed: examples are packed where they can be (--packing)"
_4_BITS = "is fixed by --load_in_4bit: NF4 with double quantisation"
_ROWS = "is not needed: name a file of rows with --data_file"
#: What others have and nothing here does, and why.
REASONS = {
    **dict.fromkeys(
        (
            "assistant_only_loss", "completion_only_loss", "mask_prompt", "train_on_inputs",
            "train_on_input", "train_on_prompt", "train_on_responses_only",
        ),
        _ANSWER_ONLY,
    ),
    **dict.fromkeys(
        (
            "eval_packing", "eval_sample_packing", "group_by_length", "neat_packing", "packed",
            "packing_strategy", "pad_to_max_length", "pad_to_multiple_of",
            "pad_to_sequence_len", "padding_free", "sample_packing",
        ),
        _PACKED,
    ),
    **dict.fromkeys(
        (
            "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant", "double_quantization", "use_bnb_nested_quant",
        ),
        _4_BITS,
    ),
    **dict.fromkeys(
        ("bits", "load_in_8bit", "quantization", "quantization_bit", "quantize"),
        "is not here: a base is 4-bit with --load_in_4bit true, else of its --dtype",
    ),
    **dict.fromkeys(
        ("dataset_config", "dataset_config_name", "dataset_streaming", "streaming"), _ROWS
    ),
    **dict.fromkeys(
        ("finetuning_type", "use_lora", "use_peft"), "is not needed: what is trained is a LoRA"
    ),
    "use_unsloth": "is not here: fused layers and captured steps are chosen by --step auto",
    "loss_type": "is not an option: give LoraTrainer an objective",
    "stage": "is not needed: what is trained is a task's answers (--task)",
    "warmup_ratio": "is --warmup_steps here, which below 1 is a share of all steps",
    "overwrite_cache": "is not needed: tokens are not cached",
    "preprocessing_num_workers": "is not needed: rows are tokenised before the processes meet",
    "dataset_num_proc": "is not needed: rows are tokenised before the processes meet",
    "fsdp_config_file": "is --accelerate_config here: FSDP is configured by an accelerate YAML",
}  # fmt: skip

#: Of `lora-fsdp train`, which hands all others on to processes that do not know them.
_OF_THE_LAUNCH = ("accelerate_config", "main_process_port", "num_processes")
_OURS = {theirs: ours for ours, names in NAMES.items() for theirs in names.split()}
_OPPOSITES = (("min", "max"), ("train", "eval"), ("first", "last"), ("input", "output"),
              ("before", "after"), ("text", "label"), ("enable", "disable"))  # fmt: skip
# Below this two names are more likely two things than one thing misspelt.
_ALIKE = 0.75


def about_unknown(name: str, known: Collection[str]) -> str:
    """What is said after an unknown option: its name here, a reason, the nearest name, or "".

    Args:
        name: without dashes before it.
        known: the options that there are.
    """
    plain = name.strip().replace("-", "_").replace(".", "_").lower()
    for candidate in (plain, plain.removeprefix("no_"), plain.rpartition("lora_config_")[2]):
        ours = _OURS.get(candidate)
        trains = "output_dir" in known and "learning_rate" in known
        if ours and (ours in known or (trains and ours in _OF_THE_LAUNCH)):
            return f"is called --{ours} here"
        if trains and candidate in REASONS:
            return REASONS[candidate]
    begun = [one for one in known if len(plain) > 2 and one.startswith(plain)]
    nearest = (
        begun
        if len(begun) == 1
        else difflib.get_close_matches(plain, list(known), n=1, cutoff=_ALIKE)
    )
    if nearest and not _is_another_thing(plain, nearest[0]):
        return f"did you mean --{nearest[0]}?"
    return ""


def _is_another_thing(given: str, nearest: str) -> bool:
    """Whether names that are alike mean different things: other numbers, letters, opposites."""
    if re.findall(r"\d+", given) != re.findall(r"\d+", nearest):
        return True
    mine, other = set(given.split("_")), set(nearest.split("_"))
    unlike = mine ^ other
    letters = [word for word in unlike if len(word) == 1]
    return len(letters) > 1 or any({a, b} <= unlike for a, b in _OPPOSITES)
