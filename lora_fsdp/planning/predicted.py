"""What a placed run is foretold to need, in the words of `metrics.json`."""

from __future__ import annotations

from lora_fsdp.data.workload import Work
from lora_fsdp.placement.gpus import Gpu
from lora_fsdp.placement.timing import step_seconds
from lora_fsdp.training.place import TrainingPlan


def predicted(plan: TrainingPlan, work: Work | None, gpu: Gpu | None) -> dict[str, float]:
    """Peak memory, and training time where the GPU is known; to be set beside what was measured.

    Args:
        plan: how the run was placed.
        work: what it computes.
        gpu: its GPUs' kind; `None` = unknown.
    """
    if plan.shape is None or plan.peak_memory is None:
        return {}
    found = {"peak_memory_gb": round(plan.peak_memory / 1e9, 3)}
    if work is not None and gpu is not None:
        step = step_seconds(
            plan.shape, plan.placement, work, gpu, sequence_tokens=plan.max_tokens_per_row
        )
        found["training_seconds"] = round(step * work.steps(plan.placement.ranks), 3)
    return found
