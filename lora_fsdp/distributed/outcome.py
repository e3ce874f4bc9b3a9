"""What only rank 0 does, with one outcome for every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from lora_fsdp.errors import LaunchError, LoraFsdpError

Result = TypeVar("Result")


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Do `action` on rank 0 and give every rank what it returned, or raise on every rank.

    A collective call. Without it a rank 0 that fails (a full disk) would leave the others waiting
    for it in their next collective until that times out.

    Raises:
        LoraFsdpError: what rank 0 raised, on every rank; an error that is not this library's is
            raised as it is on rank 0, and as a `LaunchError` that quotes it on the others.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    outcome: list[tuple[Result | None, LoraFsdpError | None]] = [(None, None)]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [(action(), None)]
        except LoraFsdpError as error:
            failure, outcome = error, [(None, error)]
        except Exception as error:
            quoted = LaunchError(f"Rank 0 failed: {type(error).__name__}: {error}")
            failure, outcome = error, [(None, quoted)]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    result, error_of_first = outcome[0]
    if error_of_first is not None:
        raise error_of_first
    return result  # type: ignore[return-value]


def from_every_rank(value: Result) -> list[Result]:
    """`value` of every rank, by rank, on every rank. A collective call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Result | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]
