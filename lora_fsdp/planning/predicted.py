"""What a placed run is predicted to need, in the words of `metrics.json`, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_fsdp.data.workload import Work
from lora_fsdp.placement.decide import Placement
from lora_fsdp.placement.gpus import Gpu
from lora_fsdp.placement.whole_job import RENTED, Job, Machine, job_seconds


def predicted(
    placement: Placement,
    work: Work,
    gpu: Gpu | None,
    *,
    machine: Machine = RENTED,
    job: Job | None = None,
) -> dict[str, Any]:
    """Peak memory of a GPU, and times where its kind is known.

    Args:
        placement, work: of the run.
        gpu: its kind; `None` = not known.
        machine: what its time depends on beside the GPUs.
        job: what of it is no part of a step; `None` = the base, read once, and one adapter saved.
    """
    found: dict[str, Any] = {}
    if placement.free is not None:
        found["peak_memory_gb"] = round(placement.peak_memory / 1e9, 3)
    if gpu is not None:
        shape = placement.shape
        parts = job_seconds(
            shape,
            placement.layout,
            work,
            gpu,
            machine=machine,
            job=job or Job(float(shape.base_bytes(quantized=False))),
            sequence_tokens=placement.sequence_length,
        )
        found["training_seconds"] = round(parts["train"], 3)
        found["seconds_by_part"] = {part: round(seconds, 3) for part, seconds in parts.items()}
    return found


def beside_measured(parts: Mapping[str, float], measured: Mapping[str, float]) -> str:
    """Predicted and measured seconds of a job, part by part and together, in a line.

    Args:
        parts: predicted.
        measured: as the run noted them, with what nobody has named.
    """
    lines = [
        f"{part} {seconds:.1f} / {measured.get(part, 0.0):.1f}"
        for part, seconds in parts.items()
        if seconds >= 0.05 or measured.get(part, 0.0) >= 0.05
    ]
    together = f"{sum(parts.values()):.1f} / {sum(measured.values()):.1f} s"
    return f"Predicted / measured: {', '.join(lines)}; the whole job {together}"
