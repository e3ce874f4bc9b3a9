"""The random number generators of a rank, taken and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


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


def put_back_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue every generator where `take_random_state` found it."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    keys = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": keys}})
    torch.random.set_rng_state(_from_text(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_from_text(state["cuda"]), device)


def draw_random_state(*, seed: int, step: int, rank: int) -> None:
    """Start every generator anew, differently for each rank and step.

    For a run that goes on with another number of ranks, where a saved state fits no rank.
    """
    drawn = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


def _to_text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
