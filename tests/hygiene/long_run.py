"""A long run of a toy model, and how its process grows: memory, open files, threads, children.

Run: python -m tests.hygiene.long_run 2000
"""

from __future__ import annotations

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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.rows.append(
                (
                    state.global_step,
                    self.process.memory_full_info().uss / MEBIBYTE,
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
        `slope`, MiB of host memory a thousand steps (least squares), and of memory, open files,
        threads and children the first and last measurement after the warm-up.
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
    return {"slope": float(slope), "peak": float(warm[:, 1].max()), **ends}


def main() -> None:
    """Print the figures of a run."""
    steps = int(sys.argv[1])
    torch.set_num_threads(1)  # toy layers: more threads wait for each other
    with tempfile.TemporaryDirectory() as folder:
        grown = long_run(folder, steps, every=10)
    first = int(WARM_UP * steps)
    print(f"\nsteps {first} to {steps}")
    print(f"host memory: {grown['slope']:+.2f} MiB a thousand steps, {grown['memory']} MiB")
    for name in ("files", "threads", "children"):
        print(f"{name}: {grown[name]}")


if __name__ == "__main__":
    main()
