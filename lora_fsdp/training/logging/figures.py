"""Speed, remaining time, cost and GPU load of a run, for the logs and all trackers.

Everything here happens when the Trainer logs, never at the steps between: what was seen in a span
of steps is worked out from the order of examples, which is a function of (seed, epoch, step), and
only the GPUs' load is gathered, in one collective.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import psutil
import torch

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.sampling import epoch_order
from lora_fsdp.ranks import gather_tensors

_GIGABYTE = 1e9


@dataclass
class RunFigures:
    """What a person or a tracker wants to know beside the loss.

    Attributes:
        examples: all training examples.
        examples_per_step: of one optimizer step over all ranks.
        seed: of their order.
        device: where this rank computes.
        world_size: number of ranks.
        price_per_hour: of one GPU (without GPUs: of the machine), in any currency; `None` = not
            wanted.
    """

    examples: Sequence[EncodedExample]
    _: KW_ONLY
    examples_per_step: int
    seed: int
    device: torch.device
    world_size: int
    price_per_hour: float | None

    def __post_init__(self) -> None:
        self.lengths = np.array([one.tokens for one in self.examples], dtype=np.int64)
        self._epoch: tuple[int, list[int]] = (-1, [])
        self.start(0)

    def start(self, step: int) -> None:
        """Measure from here on; `step` optimizer steps were made before."""
        self._began = self._logged = (time.perf_counter(), step)

    def leave_out(self, seconds: float) -> None:
        """Do not count an evaluation of so many seconds into the speed of training."""
        then, step = self._logged
        self._logged = (then + seconds, step)

    def at(self, step: int, *, last: int) -> dict[str, float]:
        """The figures since they were last asked for; a collective call where there are GPUs.

        Args:
            step: optimizer steps made so far.
            last: optimizer steps of the whole run.

        Returns:
            `examples_per_second` and `tokens_per_second` (tokens of the examples, as if computed
            one by one) over all ranks; `eta_seconds`, at the run's pace so far; `cost` if there is
            a price; for every rank with a GPU `gpu_memory_gb/<rank>`, the peak that torch has
            reserved, and, where NVML can be asked (`nvidia-ml-py`), `gpu_utilization/<rank>` in
            percent.
        """
        now = time.perf_counter()
        (then, first), (began, first_of_all) = self._logged, self._began
        seconds = max(now - then, 1e-9)
        examples, tokens = self._seen(first, step)
        pace = (now - began) / max(step - first_of_all, 1)
        self._logged = (now, step)
        figures = {
            "examples_per_second": examples / seconds,
            "tokens_per_second": tokens / seconds,
            "eta_seconds": pace * (last - step),
        }
        if self.price_per_hour is not None:
            paid = self.world_size if self.device.type == "cuda" else 1
            figures["cost"] = self._hours() * paid * self.price_per_hour
        return figures | self._gpu_load()

    def _seen(self, first: int, last: int) -> tuple[int, int]:
        """Examples and their tokens of the optimizer steps from `first` to before `last`."""
        steps = -(-len(self.lengths) // self.examples_per_step)
        examples = tokens = 0
        for step in range(first, last):
            epoch, place = divmod(step, steps)
            if self._epoch[0] != epoch:
                order = epoch_order(len(self.lengths), seed=self.seed, epoch=epoch)
                self._epoch = (epoch, order)
            start = place * self.examples_per_step
            chosen = self._epoch[1][start : start + self.examples_per_step]
            examples += len(chosen)
            tokens += int(self.lengths[chosen].sum())
        return examples, tokens

    def _hours(self) -> float:
        """Since this process was started: a rented machine is paid while a model loads, too."""
        return (time.time() - psutil.Process().create_time()) / 3600

    def _gpu_load(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        memory = torch.cuda.max_memory_reserved(self.device) / _GIGABYTE
        measured = [memory, _utilization(self.device)]
        mine = torch.tensor(measured, dtype=torch.float32, device=self.device)
        names = ("gpu_memory_gb", "gpu_utilization")
        return {
            f"{name}/{rank}": value
            for rank, values in enumerate(torch.stack(gather_tensors(mine)).tolist())
            for name, value in zip(names, values, strict=True)
            if not math.isnan(value)
        }


def _utilization(device: torch.device) -> float:
    """Percent of the last moments in which the GPU was busy; NaN where NVML cannot say."""
    try:
        import pynvml
    except ImportError:
        return math.nan
    try:
        return float(torch.cuda.utilization(device))
    except (RuntimeError, pynvml.NVMLError):  # a driver without it, or a slice of a GPU (MIG)
        return math.nan
