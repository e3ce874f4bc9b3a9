"""This process among the others of a launch: who is there, and what they tell one another.

The only place that asks the process group.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from lora_fsdp.errors import LaunchError, LoraFsdpError, RankMismatchError

Result = TypeVar("Result")


def is_joined() -> bool:
    """Whether this process belongs to a process group, be it alone in it."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if is_joined() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_joined() else 0


def has_others() -> bool:
    """Whether there is any rank beside this one."""
    return world_size() > 1


def host_count() -> int:
    """Machines that the ranks are on, as their launcher says; 1 without one."""
    said = os.environ.get("GROUP_WORLD_SIZE")
    if not is_joined() or said is None:
        return -(-world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
    return int(said)


def host() -> int:
    """The place of this process's machine among them."""
    if not is_joined():
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return int(os.environ.get("GROUP_RANK", rank() // local))


def ranks_on_host() -> int:
    """Ranks on this process's machine, itself included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if is_joined() else 1


def is_first_of_host() -> bool:
    """Whether this rank acts for its machine."""
    return not is_joined() or int(os.environ.get("LOCAL_RANK", rank())) == 0


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """Sum `tensor` over all ranks, in place. A collective call."""
    if has_others():
        dist.all_reduce(tensor)


def gather_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's `tensor`, by rank; all of one shape and dtype. A collective call."""
    if not has_others():
        return [tensor]
    everyone = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(everyone, tensor)
    return everyone


def take_from_first(tensor: torch.Tensor) -> None:
    """Overwrite `tensor` with rank 0's. A collective call."""
    if has_others():
        dist.broadcast(tensor, src=0)


def least_of_ranks(value: int, *, device: torch.device) -> int:
    """The least of every rank's `value`. A collective call."""
    if not has_others():
        return value
    least = torch.tensor(value, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least.item())


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Do `action` on rank 0 and give every rank what it returned, or raise on every rank.

    A collective call. Without it a rank 0 that fails (a full disk) would leave the others waiting
    for it in their next collective until that times out.

    Raises:
        LoraFsdpError: what rank 0 raised, on every rank; an error that is not this library's is
            raised as it is on rank 0, and as a `LaunchError` that quotes it on the others.
    """
    if not has_others():
        return action()
    outcome: list[tuple[Result | None, LoraFsdpError | None]] = [(None, None)]
    failure: Exception | None = None
    if rank() == 0:
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
    if not has_others():
        return [value]
    values: list[Result | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def from_rank(sender: int, value: Result) -> Result:
    """`value` of one rank, on every rank. A collective call."""
    if not has_others():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=sender)
    return held[0]


def on_first_of_hosts(action: Callable[[], object]) -> None:
    """Do `action` on rank 0, and then on the first rank of every other host. A collective call.

    Raises:
        LoraFsdpError: what was raised, on every rank; of another host than the first, by its name.
    """
    on_first_rank(action)
    failure: LoraFsdpError | None = None
    if is_first_of_host() and rank() != 0:
        try:
            action()
        except LoraFsdpError as error:
            failure = type(error)(f"{socket.gethostname()}: {error}")
        except Exception as error:
            failure = LaunchError(f"{socket.gethostname()}: {type(error).__name__}: {error}")
    for one in from_every_rank(failure):
        if one is not None:
            raise one


def check_ranks_agree(fingerprints: Mapping[str, str]) -> None:
    """Compare named fingerprints (settings, data) across ranks.

    Raises:
        RankMismatchError: names what differs and its value on each rank.
    """
    everyone = from_every_rank(dict(fingerprints))
    for name in fingerprints:
        values = [facts.get(name, "(missing)") for facts in everyone]
        if len(set(values)) > 1:
            listed = ", ".join(f"rank {place}: {value}" for place, value in enumerate(values))
            raise RankMismatchError(
                f"The ranks differ in {name} ({listed}): start every rank with the same command, "
                "YAML and files."
            )
