"""What a placed run is predicted to need, in the words of `metrics.json`."""

from __future__ import annotations

from typing import Any

from lora_fsdp.data.workload import Work
from lora_fsdp.placement.decide import Placement
from lora_fsdp.placement.gpus import Gpu
from lora_fsdp.placement.timing import part_seconds


def predicted(placement: Placement, work: Work, gpu: Gpu | None) -> dict[str, Any]:
    """Peak memory, and times where the kind of GPU is known."""
    found: dict[str, Any] = {"peak_memory_gb": round(placement.peak_memory / 1e9, 3)}
    if gpu is not None:
        length = placement.sequence_length
        shape, layout = placement.shape, placement.layout
        parts = part_seconds(shape, layout, work, gpu, sequence_tokens=length)
        found["training_seconds"] = round(parts["train"], 3)
        found["seconds_by_part"] = {part: round(seconds, 3) for part, seconds in parts.items()}
    return found
