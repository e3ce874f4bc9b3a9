"""What a placed run is predicted to need, in the words of `metrics.json`."""

from __future__ import annotations

from lora_fsdp.data.workload import Work
from lora_fsdp.placement.decide import Placement
from lora_fsdp.placement.gpus import Gpu
from lora_fsdp.placement.timing import step_seconds


def predicted(placement: Placement, work: Work, gpu: Gpu | None) -> dict[str, float]:
    """Peak memory, and training time where the kind of GPU is known."""
    found = {"peak_memory_gb": round(placement.peak_memory / 1e9, 3)}
    if gpu is not None:
        length = placement.sequence_length
        step = step_seconds(placement.shape, placement.layout, work, gpu, sequence_tokens=length)
        found["training_seconds"] = round(step * work.steps, 3)
    return found
