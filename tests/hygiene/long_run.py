"""A long run of a toy model, and how its process grows: memory, open files, threads, children.

Memory is the anonymous part of what is resident: pages of files (libraries) count or not as other
processes come and go. It is measured after a garbage collection, and after the C library has given
back what it keeps for later: unforced, both make it swing by tens of MiB over hundreds of steps, in
which a small leak would hide. The highest value before a collection is reported beside it.

Run: python -m tests.hygiene.long_run 2000
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from tests.support.runs import toy_trainer

MEBIBYTE = 2**20
# What is measured first is left out: imports, caches and allocators fill up.
WARM_UP = 0.3


class Measure(TrainerCallback):
    """The process after every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.process = psutil.Process()
        self.rows: list[tuple[float, ...]] = []
        self.peak = 0.0

    def memory(self) -> float:
        """Resident anonymous MiB."""
        info = self.process.memory_info()
        return (info.rss - info.shared) / MEBIBYTE

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.peak = max(self.peak, self.memory())
            gc.collect()
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)
            self.rows.append(
                (
                    state.global_step,
                    self.memory(),
                    self.process.num_fds(),
                    self.process.num_threads(),
                    len(self.process.children(recursive=True)),
                )
            )


def long_run(
    folder: str | Path, steps: int, *, every: int, callbacks: list[Any] | None = None
) -> dict[str, Any]:
    """Train with evaluations, checkpoints and logs; growth after the warm-up.

    Args:
        folder: where the run is written.
        steps: optimizer steps.
        every: how often to measure.
        callbacks: further callbacks.

    Returns:
        `slope`, MiB of host memory a thousand steps (least squares); `peak`, the most MiB before a
        collection; and of memory, open files, threads and children the first and last measurement
        after the warm-up.
    """
    measure = Measure(every)
    trainer = toy_trainer(
        folder,
        dropout=0.1,
        max_steps=steps,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=max(steps // 10, 1),
        save_strategy="steps",
        save_steps=max(steps // 10, 1),
        save_total_limit=2,
        callbacks=[measure, *(callbacks or [])],
    )
    trainer.train()
    table = np.array(measure.rows)
    warm = table[table[:, 0] > WARM_UP * steps]
    names = ("memory", "files", "threads", "children")
    ends = {name: warm[[0, -1], i].tolist() for i, name in enumerate(names, start=1)}
    slope = 1000 * np.polyfit(warm[:, 0], warm[:, 1], 1)[0]
    return {"slope": float(slope), "peak": measure.peak, **ends}


def main() -> None:
    """Print the figures of a run."""
    steps = int(sys.argv[1])
    torch.set_num_threads(1)  # toy layers: more threads wait for each other
    with tempfile.TemporaryDirectory() as folder:
        grown = long_run(folder, steps, every=50)
    first = int(WARM_UP * steps)
    print(f"\nsteps {first} to {steps}")
    first_memory, last_memory = grown["memory"]
    print(
        f"host memory: {grown['slope']:+.2f} MiB a thousand steps, {first_memory:.1f} MiB at first "
        f"and {last_memory:.1f} at last, never above {grown['peak']:.1f} before a collection"
    )
    for name in ("files", "threads", "children"):
        print(f"{name}: {grown[name]}")


if __name__ == "__main__":
    main()
