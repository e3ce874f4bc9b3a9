"""What the machine at hand takes for what no data sheet says: imports, reading, matmuls, copies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch.nn import functional

from lora_fsdp.placement.gpus import Gpu
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.placement.whole_job import RENTED, Job, Machine

# Seconds for which a rate is measured, after it has been tried once.
_MEASURED = 0.1
_READ_BYTES = 64 * 2**20
# Of a run's start over a plan's: by a profile of both, the launcher imports a quarter of what its
# processes do, and these a tenth more than a plan.
_START_OVER_PLAN = 1.4
# A process that is older has done something else than to import.
_OLDEST = 120.0
# Two CPU processes over gloo: bytes of 538 MB in shards that each received in a second.
_GLOO_RATE = 6e8


def cpu_here(shape: ModelShape, *, tokens: float, ranks: int) -> Gpu:
    """One process's part of this machine's CPU, its rates measured in half a second.

    Args:
        shape: of the run's model, in whose dtype and widths matmuls are measured.
        tokens: of a packed sequence.
        ranks: processes that share the CPU; several have a thread each, as their launcher gives
            them, unless OMP_NUM_THREADS says otherwise.
    """
    before = torch.get_num_threads()
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        matmuls, copies = _matmul_rate(shape, max(1, int(tokens))), _copy_rate()
    finally:
        torch.set_num_threads(before)
    return Gpu(
        name="CPU",
        memory=psutil.virtual_memory().total // ranks,
        flops=matmuls,
        bandwidth=copies,
        link=_GLOO_RATE,
        host_link=copies,
        is_cpu=True,
    )


def machine_here(
    model: str, *, start: float | None = None, read_rate: float | None = None
) -> Machine:
    """The machine at hand.

    Args:
        model: the base, of whose files a part is read if it is a folder.
        start: seconds that the run took to start, if it has; otherwise by what this process took.
        read_rate: bytes a second, if they are given.
    """
    if start is None:
        own = time.time() - psutil.Process().create_time()
        start = _START_OVER_PLAN * own if own < _OLDEST else RENTED.start
    rate = read_rate or _read_rate(Path(model).expanduser()) or RENTED.read_rate
    source = f"measured here: it starts in {start:.0f} s and reads {rate / 1e9:.2g} GB/s"
    return replace(RENTED, start=start, read_rate=rate, source=source)


def job_of(model: str) -> Job | None:
    """What reading a model folder's safetensors files is; `None` where there are none."""
    found = sum(file.stat().st_size for file in Path(model).expanduser().glob("*.safetensors"))
    return Job(float(found)) if found else None


def _matmul_rate(shape: ModelShape, tokens: int) -> float:
    """Operations a second of matmuls such as the model's layers make."""
    dtype = torch.bfloat16 if shape.itemsize == 2 else torch.float32
    wide = 3 * shape.hidden_size
    inputs = torch.randn(tokens, shape.hidden_size).to(dtype)
    weight = torch.randn(wide, shape.hidden_size).to(dtype)
    operations = 2.0 * tokens * shape.hidden_size * wide
    return operations / _seconds(lambda: functional.linear(inputs, weight))


def _copy_rate() -> float:
    """Bytes a second that are read or written in memory."""
    source = torch.ones(8 * 2**20)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _seconds(lambda: target.copy_(source))


def _seconds(call: Callable[[], object]) -> float:
    """Of one call, the mean over a moment."""
    call()
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < _MEASURED:
        call()
        count += 1
    return spent / count


def _read_rate(folder: Path) -> float | None:
    """Bytes a second of a part of the folder's first file, from the disk or from its cache."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    began = time.perf_counter()
    with files[0].open("rb", buffering=0) as opened:
        size = len(opened.read(_READ_BYTES))
    return size / max(time.perf_counter() - began, 1e-6)
