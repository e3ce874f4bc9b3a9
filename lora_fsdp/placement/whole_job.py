"""Seconds of a whole job: what its GPUs compute, and what its machine does before and after.

The parts have the names under which a run notes what it took. Where the machine at hand is planned
for, its own rates are measured (`lora_fsdp.sizing.machine`); of a machine that nobody has rented
yet, `RENTED` says what is assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_fsdp.data.workload import Work
from lora_fsdp.placement.gpus import Gpu
from lora_fsdp.placement.layout import Layout, is_captured
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.placement.timing import forward_seconds, part_seconds

#: In the order in which a run comes to them.
PARTS = ("start", "read", "score", "capture", "train", "evaluate", "save", "report")
# A layer's part in all the graphs that a run captures: on one H200, 40 steps of a 7B of 30 layers
# took 0.95 s longer than 40 of its median step.
_CAPTURE_SECONDS_A_LAYER = 0.95 / 30
# Bytes of a parameter of the adapter in a checkpoint: itself and AdamW's two moments.
_CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class Machine:
    """What of a job's time depends on its machine beside the GPUs.

    Attributes:
        start: seconds from the command to the run: its launcher's imports and the processes' own.
        read_rate: bytes a second at which the base's files reach the processes.
        checkpoint: seconds of writing and proving one, whatever its size.
        write_rate: bytes a second at which checkpoints are written and read back.
        classic: seconds in which the classic baselines and the checks of labels take a row.
        report: seconds of what a run writes about itself, whatever its rows.
        source: where these come from, in words.
    """

    start: float
    read_rate: float
    checkpoint: float
    write_rate: float
    classic: float
    report: float
    source: str


#: Seconds a row of the classic baselines (5,000 tweets took 2.6 s of one CPU core, 1,300 took 1.1).
CLASSIC_SECONDS_A_ROW = 6e-4
#: A machine of which nothing was measured. One H200 showed its first line about a run of a 7B after
#: 40.8 s, of which 13.8 GB at this rate are 14, and the last line 4 s after the last step.
RENTED = Machine(
    start=25.0,
    read_rate=1e9,
    checkpoint=0.5,
    write_rate=2e8,
    classic=CLASSIC_SECONDS_A_ROW,
    report=4.0,
    source="assumed: it starts in 25 s and reads 1 GB/s (--read_rate)",
)


@dataclass(frozen=True)
class Job:
    """What of a job is no part of a step.

    Attributes:
        base_bytes: of the base's files.
        checkpoints: that are written, the adapter at the end included.
    """

    base_bytes: float
    checkpoints: int = 1


def job_seconds(
    shape: ModelShape,
    layout: Layout,
    work: Work,
    gpu: Gpu,
    *,
    machine: Machine,
    job: Job,
    sequence_tokens: int,
    link: float = math.inf,
) -> dict[str, float]:
    """Seconds of every part of a job, in the order of `PARTS`.

    Args:
        shape, layout, work, gpu: of the run.
        machine, job: of the rest.
        sequence_tokens: longest packed sequence.
        link: bytes per second that a host can send to others.
    """
    computed = part_seconds(shape, layout, work, gpu, sequence_tokens=sequence_tokens, link=link)
    tokens = min(float(sequence_tokens), work.step_tokens)
    # A sequence of the run's own examples is computed packed and one by one before it is trained.
    checked = 2.0 * forward_seconds(shape, layout, gpu, tokens=tokens, length=tokens)
    captured = is_captured(shape, layout, tokens=tokens)
    written = job.checkpoints * _CHECKPOINT_BYTES * shape.adapter_parameters
    found = {
        "start": machine.start,
        "read": job.base_bytes / machine.read_rate + checked,
        "score": computed["score"] + machine.classic * work.rows,
        "capture": _CAPTURE_SECONDS_A_LAYER * shape.layers if captured else 0.0,
        "train": computed["train"],
        "evaluate": computed["evaluate"],
        "save": job.checkpoints * machine.checkpoint + written / machine.write_rate,
        "report": machine.report,
    }
    return {part: found[part] for part in PARTS}
