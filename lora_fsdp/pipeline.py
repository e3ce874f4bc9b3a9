"""`finetune`: the whole story on one screen."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import set_seed

from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.data.rows import TaskData, load_task_data
from lora_fsdp.distributed.sharding import release_gathered
from lora_fsdp.distributed.status import fsdp_status
from lora_fsdp.errors import OutputFolderError
from lora_fsdp.evaluation.comparison import Comparison, compare, written_answers
from lora_fsdp.evaluation.generation import generate_texts
from lora_fsdp.modeling.adapters import lora_config
from lora_fsdp.modeling.loading import load_base, load_tokenizer
from lora_fsdp.tasks import Task
from lora_fsdp.training.output_lock import (
    refuse_folder_in_use,
    release_output_lock,
    take_output_lock,
)
from lora_fsdp.training.trainer import LoraTrainer

# What a run leaves in its folder and no other program does; nothing else is ever removed.
_RUN_FILES = (
    "checkpoint-*",
    "adapter_config.json",
    "adapter_model.safetensors",
    "confusion_matrix.png",
    "metrics.json",
    "predictions.csv",
    "task.json",
    "training_args.json",
)


@dataclass(frozen=True)
class FineTuningResult:
    """What a run leaves behind.

    Attributes:
        output_dir: the adapter's folder, with the tokenizer, `metrics.json`, `predictions.csv` and
            `confusion_matrix.png`.
        comparison: the tuned model's metrics beside those of the untrained model and the baselines,
            on the held-out rows; the same on every rank.
    """

    output_dir: Path
    comparison: Comparison


def finetune(
    *,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
    training_args: FineTuningArguments,
    task: Task | None = None,
) -> FineTuningResult:
    """Train an adapter for a task, prove it, and compare it with what it should beat.

    Called by every process of a launch. `task` stands in for `data_args.task`.
    """
    output_dir = claim_output_folder(training_args)
    data = load_task_data(data_args, seed=training_args.seed, task=task)
    set_seed(training_args.seed)  # the adapter's first values
    trainer = LoraTrainer(
        model=load_base(model_args, device=training_args.device),
        args=training_args,
        task=data.task,
        processing_class=load_tokenizer(model_args),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        peft_config=lora_config(lora_args),
        max_length=data_args.max_length,
        chat_template=data_args.chat_template,
    )
    _announce(trainer, data)

    with trainer.model.disable_adapter():
        untrained = trainer.score(data.held_out)
        base_texts = _write_freely(trainer)
    trained = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    tuned = trainer.score(data.held_out)
    tuned_texts = _write_freely(trainer)
    trainer.save_model()

    comparison = compare(
        data.task,
        train=data.train,
        held_out=data.held_out,
        encoded=trainer.eval_dataset,  # type: ignore[arg-type]
        untrained=untrained,
        tuned=tuned,
        written=written_answers(data.task, data.held_out, base=base_texts, tuned=tuned_texts),
        facts=_facts(trainer, data, trained.metrics),
    )
    if trainer.is_world_process_zero():
        comparison.save(output_dir)
        print(f"\n{comparison}\n\nAdapter, metrics and predictions: {output_dir}", flush=True)
    trainer.accelerator.wait_for_everyone()
    release_output_lock(output_dir)
    return FineTuningResult(output_dir, comparison)


def claim_output_folder(arguments: FineTuningArguments) -> Path:
    """The output folder, with an earlier run's files removed if that was asked for.

    Raises:
        OutputFolderError: it holds a run, and neither resuming nor overwriting was asked for; or
            it is to be resumed and holds no checkpoint.
    """
    folder = Path(arguments.output_dir or ".")
    refuse_folder_in_use(folder)
    left = [path for pattern in _RUN_FILES for path in folder.glob(pattern)]
    resume = arguments.resume_from_checkpoint
    checkpoint = Path(resume) if isinstance(resume, str) else None
    found = checkpoint.is_dir() if checkpoint else any(folder.glob("checkpoint-*"))
    # Every rank looks before rank 0 changes anything.
    _wait_for_all_ranks()
    if resume and not found:
        raise OutputFolderError(
            f"There is no checkpoint {checkpoint or folder / 'checkpoint-*'} to resume from: leave "
            "--resume_from_checkpoint out to start anew."
        )
    if left and not resume and not arguments.overwrite_output_dir:
        raise OutputFolderError(
            f"{folder} already holds a run: choose another --output_dir, continue it with "
            "--resume_from_checkpoint true, or replace it with --overwrite_output_dir true."
        )
    if arguments.process_index == 0:
        take_output_lock(folder)
        for path in () if resume else left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _wait_for_all_ranks()
    return folder


def _announce(trainer: LoraTrainer, data: TaskData) -> None:
    """Say what is about to happen, before it costs anything."""
    status = fsdp_status(trainer.model)
    if not trainer.is_world_process_zero():
        return
    labels = ", ".join(data.task.labels) if data.task.labels else "free text"
    print(f"Task {data.task.name}: {len(data.train)} training rows, {len(data.held_out)} held out")
    print(f"  answers: {labels}")
    if data.dropped:
        print(f"  rows left out as unusable: {data.dropped}")
    print(f"  rows whose text was shortened to fit: {trainer.shortened}")
    print(
        f"  prompts' common prefix computed once a row: {'yes' if trainer.share_prefix else 'no'}"
    )
    print(status)
    print(f"Scoring the untrained model on {len(data.held_out)} held-out rows, then training.")
    sys.stdout.flush()


def _write_freely(trainer: LoraTrainer) -> list[str]:
    """What the model writes by itself on the first held-out rows."""
    args = trainer.args
    chosen = trainer.eval_dataset[: args.generate_examples]  # type: ignore[index]
    texts = generate_texts(
        trainer.model,
        trainer.processing_class,
        [example.prompt_ids for example in chosen],
        device=args.device,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        end_token_id=trainer.encoder.end_token_id,
    )
    release_gathered(trainer.model)
    return texts


def _facts(trainer: LoraTrainer, data: TaskData, trained: dict[str, float]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "task": data.task.name,
        "labels": list(data.task.labels or ()),
        "training_rows": len(data.train),
        "held_out_rows": len(data.held_out),
        "rows_left_out": data.dropped,
        "rows_shortened": trainer.shortened,
        "processes": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "training_seconds": trained["train_runtime"],
        "examples_per_second": trained["train_samples_per_second"],
        "confusion_matrices": {
            step: matrix.to_dict(orient="split")
            for step, matrix in trainer.confusion_matrices.items()
        },
    }
    if trainer.args.device.type == "cuda":
        facts["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return facts


def _wait_for_all_ranks() -> None:
    if dist.is_initialized():
        dist.barrier()
