"""What a run came to, beside its scores: the facts of `metrics.json`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import torch
from accelerate.utils import gather_object

from lora_fsdp.data.rows import TaskData
from lora_fsdp.placement.gpus import known_gpu
from lora_fsdp.planning.predicted import predicted
from lora_fsdp.training.logging.time_spent import seconds_by_part
from lora_fsdp.training.trainer import LoraTrainer


def facts_of_run(
    trainer: LoraTrainer, data: TaskData, trained: dict[str, float], *, first_step: int
) -> dict[str, Any]:
    steps = trainer.state.global_step
    tokens = [len(one.prompt_ids) + len(one.target_ids) for one in trainer.train_dataset]
    # Counted here: not every version of the Trainer leaves out what a resumed run did before.
    seen = trainer.schedule.examples_before(steps) - trainer.schedule.examples_before(first_step)
    speed = seen / max(trained["train_runtime"], 1e-9)
    facts: dict[str, Any] = {
        "seconds_by_part": seconds_by_part(),  # of the last ones more follow: `save_facts`
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": data.task.name,
        "labels": list(data.task.answer_kind.labels),
        "training_rows": len(data.train),
        "held_out_rows": len(data.reported),
        "validation_rows": len(data.held_out) if data.test else None,
        "chosen_among": _chosen_among(trainer) if not data.test else None,
        "rows_left_out": data.dropped,
        "rows_shortened": trainer.shortened,
        "processes": trainer.args.world_size,
        "steps": steps,
        "first_step": first_step,
        "training_seconds": trained["train_runtime"],
        "examples_per_second": speed,
        "tokens_per_second": speed * sum(tokens) / len(tokens),
        "confusion_matrices": {
            step: matrix.to_dict(orient="split")
            for step, matrix in trainer.confusion_matrices.items()
        },
    }
    return facts | _predicted_and_measured(trainer, trained["train_runtime"])


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
        device = torch.cuda.get_device_properties(trainer.args.device)
        gpu = known_gpu(device.name, memory=device.total_memory)
        facts["plan"] = predicted(trainer.placement, trainer.work, gpu)
    if (price := trainer.args.price_per_hour) is not None:
        facts["cost"] = price * paid * seconds / 3600
        if "training_seconds" in facts.get("plan", {}):
            facts["plan"]["cost"] = price * paid * facts["plan"]["training_seconds"] / 3600
    return facts
