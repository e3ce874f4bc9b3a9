"""What a run came to, beside its scores: the facts of `metrics.json`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import torch
from accelerate.utils import gather_object

from lora_fsdp.data.rows import TaskData
from lora_fsdp.placement.gpus import known_gpu
from lora_fsdp.planning.predicted import predicted
from lora_fsdp.ranks import on_first_rank
from lora_fsdp.reporting.recording.record import RecordedRun
from lora_fsdp.sizing.machine import cpu_here, job_of, machine_here
from lora_fsdp.training.logging.time_spent import seconds_by_part
from lora_fsdp.training.trainer import LoraTrainer

# Seconds of training on a CPU, whose rates have to be measured for a prediction.
_WORTH_PREDICTING = 5.0


def facts_of_run(
    trainer: LoraTrainer, data: TaskData, trained: dict[str, float], *, first_step: int
) -> dict[str, Any]:
    """Of a run of one adapter; a collective call.

    Args:
        trainer, data: of the run.
        trained: the Trainer's metrics of training.
        first_step: at which this session began.
    """
    steps, seconds = trainer.state.global_step, trained["train_runtime"]
    # Counted here: not every version of the Trainer leaves out what a resumed run did before.
    seen = trainer.schedule.examples_before(steps) - trainer.schedule.examples_before(first_step)
    return {
        "seconds_by_part": seconds_by_part(),  # of the last ones more follow: `save_facts`
        **facts_of_training(trainer, data, steps=steps, seen=seen, seconds=seconds),
        "chosen_among": _chosen_among(trainer) if not data.test else None,
        "first_step": first_step,
        "confusion_matrices": {
            step: matrix.to_dict(orient="split")
            for step, matrix in trainer.confusion_matrices.items()
        },
        **_predicted_and_measured(trainer, seconds),
    }


def facts_of_training(
    run: RecordedRun, data: TaskData, *, steps: int, seen: float, seconds: float
) -> dict[str, Any]:
    """What is known of a run by itself and of one adapter of several.

    Args:
        run, data: of the adapter.
        steps: optimizer steps.
        seen: examples of this session.
        seconds: that training took.
    """
    tokens = [one.tokens for one in run.train_dataset]
    everything = [*run.train_dataset, *run.held_out, *run.test_dataset]
    speed = seen / max(seconds, 1e-9)
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": data.task.name,
        "labels": list(data.task.answer_kind.labels),
        "training_rows": len(data.train),
        "held_out_rows": len(data.reported),
        "validation_rows": len(data.held_out) if data.test else None,
        "rows_left_out": data.dropped,
        "rows_shortened": sum(one.shortened for one in everything),
        "processes": run.args.world_size,
        "steps": steps,
        "first_step": 0,
        "training_seconds": seconds,
        "examples_per_second": speed,
        "tokens_per_second": speed * sum(tokens) / len(tokens),
    }


def _chosen_among(trainer: LoraTrainer) -> int | None:
    """Among how many checkpoints the reported one is the best, if it was chosen."""
    if not trainer.args.chooses_checkpoint:
        return None
    metric = str(trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    return sum(f"eval_{metric}" in entry for entry in trainer.state.log_history)


def _predicted_and_measured(trainer: LoraTrainer, seconds: float) -> dict[str, Any]:
    """Memory and cost beside what was predicted; a collective call."""
    on_gpus = trainer.args.device.type == "cuda"
    paid = trainer.args.world_size if on_gpus else 1
    facts: dict[str, Any] = {}
    if on_gpus:
        peaks = gather_object([round(torch.cuda.max_memory_allocated() / 1e9, 3)])
        facts |= {"peak_memory_gb": max(peaks), "peak_memory_gb_of_ranks": peaks}
    if on_gpus or seconds >= _WORTH_PREDICTING:
        facts["plan"] = on_first_rank(lambda: _predicted(trainer))
    if (price := trainer.args.price_per_hour) is not None:
        facts["cost"] = price * paid * seconds / 3600
        if "training_seconds" in facts.get("plan", {}):
            facts["plan"]["cost"] = price * paid * facts["plan"]["training_seconds"] / 3600
    return facts


def _predicted(trainer: LoraTrainer) -> dict[str, Any]:
    """By what a plan would know of these GPUs, or of this CPU; the start is what it was."""
    placement, work, device = trainer.placement, trainer.work, trainer.args.device
    model = str(trainer.model.get_base_model().name_or_path)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = known_gpu(properties.name, memory=properties.total_memory)
    else:
        ranks = placement.layout.ranks // placement.layout.hosts
        gpu = cpu_here(placement.shape, tokens=work.step_tokens, ranks=ranks)
    machine = machine_here(model, start=seconds_by_part().get("start", 0.0))
    return predicted(placement, work, gpu, machine=machine, job=job_of(model))
