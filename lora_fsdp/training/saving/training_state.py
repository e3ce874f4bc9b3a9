"""All that a run's next step depends on beside the adapter, taken, written, read and put back."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import set_seed

from lora_fsdp.errors import DamagedCheckpointError
from lora_fsdp.ranks import from_every_rank
from lora_fsdp.training.saving.state_file import read_state, write_state

STATE_FILE = "training_state.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """What the Trainer's loop counts beside its `TrainerState`.

    Attributes:
        step: optimizer steps made.
        epochs: of the whole run.
        stopped_early: the run was over before its last step, by its metrics.
        total_loss: sum of the steps' losses up to the last log.
        step_last_logged: where that was.
        confusion_matrices: of every evaluation, by step.
    """

    step: int
    epochs: int
    stopped_early: bool
    total_loss: float
    step_last_logged: int
    confusion_matrices: dict[int | tuple[int, str], pd.DataFrame]


@dataclass(frozen=True)
class TrainingState:
    """Optimizer, schedule, every rank's random numbers, and the loop.

    Attributes:
        optimizer, scheduler: their state dicts.
        ranks: of each rank, the state of its random numbers and its loss since the last log.
        loop: what the Trainer's loop counts.
    """

    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    ranks: list[dict[str, Any]]
    loop: LoopState

    @classmethod
    def take(
        cls,
        *,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        device: torch.device,
        loss_since_log: float,
        loop: LoopState,
    ) -> TrainingState:
        """As it is now. A collective call."""
        mine = {"random": take_random_state(device), "loss_since_log": loss_since_log}
        return cls(optimizer.state_dict(), scheduler.state_dict(), from_every_rank(mine), loop)

    def write(self, folder: Path) -> None:
        """Into a checkpoint's folder.

        Raises:
            CheckpointError: the optimizer's state holds something that cannot be written.
        """
        matrices = {
            step: matrix.to_dict(orient="split")
            for step, matrix in self.loop.confusion_matrices.items()
        }
        contents = {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ranks": self.ranks,
            "loop": asdict(self.loop) | {"confusion_matrices": matrices},
        }
        write_state(folder / STATE_FILE, contents)

    @classmethod
    def read(cls, folder: Path) -> TrainingState:
        """From a checkpoint's folder, its tensors on the CPU.

        Raises:
            DamagedCheckpointError: the file cannot be read.
        """
        contents = read_state(folder / STATE_FILE)
        try:
            matrices = {
                step: pd.DataFrame(matrix["data"], matrix["index"], matrix["columns"])
                for step, matrix in contents["loop"]["confusion_matrices"].items()
            }
            loop = LoopState(**contents["loop"] | {"confusion_matrices": matrices})
            return cls(contents["optimizer"], contents["scheduler"], contents["ranks"], loop)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DamagedCheckpointError(
                f"{folder / STATE_FILE} does not hold a run's state: {error}"
            ) from error

    def is_finished(self, max_steps: int) -> bool:
        """Whether no step is left of a run of `max_steps`."""
        return self.loop.stopped_early or self.loop.step >= max_steps

    def loss_since_log(self, *, rank: int, world_size: int) -> float:
        """This rank's; for another number of ranks the mean, which is what the Trainer logs."""
        losses = [state["loss_since_log"] for state in self.ranks]
        return losses[rank] if len(losses) == world_size else sum(losses) / len(losses)

    def put_back_random_numbers(
        self, *, rank: int, world_size: int, device: torch.device, seed: int
    ) -> None:
        """Continue this rank's; draw new ones for another number of ranks."""
        if len(self.ranks) == world_size:
            _put_back_random_state(self.ranks[rank]["random"], device)
        else:
            _draw_random_state(seed=seed, step=self.loop.step, rank=rank)


def take_random_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, and of `device`'s.

    Of numbers and strings only, so that it can be sent to another rank and written as JSON.
    """
    numpy_state = np.random.get_state(legacy=False)
    keys = numpy_state["state"]["key"].tolist()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": keys}},
        "torch": _to_text(torch.random.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _to_text(torch.cuda.get_rng_state(device))
    return state


def _put_back_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue every generator where `take_random_state` found it."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    keys = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": keys}})
    torch.random.set_rng_state(_from_text(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_from_text(state["cuda"]), device)


def _draw_random_state(*, seed: int, step: int, rank: int) -> None:
    """Start every generator anew, differently for each rank and step.

    For a run that goes on with another number of ranks, where a saved state fits no rank.
    """
    set_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def _to_text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
