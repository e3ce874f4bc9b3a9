"""How many layers of the frozen base every rank keeps whole.

A frozen weight never changes, so a layer that every rank holds whole ("resident") is never gathered
again. With all layers resident a step communicates nothing but the adapter's gradients; with none
the YAML's FSDP shards everything. In between, resident layers are spread evenly among the sharded
ones, so that there is work behind which the next layer's gather can hide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.errors import ArgumentError
from lora_fsdp.ranks import least_of_ranks


@dataclass(frozen=True)
class Residency:
    """Which layers are resident.

    Attributes:
        layers_of_model: the layers that FSDP would shard one by one.
        indices: which of them every rank keeps.
        reason: why, in words.
        head: the output head, if every rank keeps that, too, where not all is resident.
    """

    layers_of_model: Sequence[nn.Module]
    indices: frozenset[int]
    reason: str
    head: nn.Module | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every rank keeps the whole base, so that nothing is sharded."""
        return len(self.indices) == len(self.layers_of_model)

    @property
    def kept(self) -> list[nn.Module]:
        """The modules that every rank keeps, if it does not keep all."""
        layers = [self.layers_of_model[index] for index in self.indices]
        return layers if self.head is None else [*layers, self.head]

    def with_head(self, head: nn.Module) -> Residency:
        """As it is, with the output head on every rank."""
        return replace(self, head=head)

    def __str__(self) -> str:
        kept, total = len(self.indices), len(self.layers_of_model)
        if self.is_whole:
            return f"every rank keeps the whole base ({self.reason})"
        head = "" if self.head is None else "; the output head stays"
        if not kept:
            return f"layers are gathered when they are needed{head} ({self.reason})"
        return f"every rank keeps {kept} of {total} layers{head} ({self.reason})"


def plan_residency(
    requested: str,
    layers: Sequence[nn.Module],
    base: nn.Module,
    *,
    settings: FsdpSettings | None,
    device: torch.device,
    fitting_layers: Callable[[int], int],
) -> Residency:
    """Decide which layers stay on every rank; a collective call, the same answer on every rank.

    Args:
        requested: `auto`, `all`, `none`, or a number of layers.
        layers: the layers that FSDP would shard one by one.
        base: the base model they are of, not yet on the device.
        settings: the YAML's FSDP settings; `None` = no FSDP, where everything is resident.
        device: where the run computes.
        fitting_layers: how many layers a rank can keep whole in so many free bytes of its device;
            asked for on GPUs only.

    Raises:
        ArgumentError: a number of layers that the model does not have, or FSDP is not asked for.
    """
    total = len(layers)

    def keep(count: int, reason: str) -> Residency:
        if settings is not None and not settings.wrap_layers and count < total:
            count = 0  # the base is one group
        return Residency(layers, _spread(count, total), reason)

    if settings is None:
        if requested not in ("auto", "all"):
            raise ArgumentError(
                f"--resident_layers {requested} needs an accelerate YAML with FSDP; without FSDP "
                "every rank keeps the whole base."
            )
        return keep(total, "no FSDP was asked for")
    if requested != "auto":
        count = _requested_count(requested, total)
        if not settings.wrap_layers and 0 < count < total:
            raise ArgumentError(
                f"--resident_layers {requested} needs layers that are sharded one by one: set "
                "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP in the accelerate YAML."
            )
        if settings.offload and count == total:
            raise ArgumentError(
                f"--resident_layers {requested} keeps the whole base on every GPU, and the YAML's "
                "fsdp_offload_params: true keeps it in host memory: drop one."
            )
        return keep(count, f"--resident_layers {requested}")
    if device.type == "cpu":
        return keep(0, "a rehearsal shards as the YAML says")
    if settings.offload:
        return keep(0, "the YAML offloads the base to host memory")
    free = least_free_memory(device)
    size = sum(parameter.nbytes for parameter in base.parameters())
    return keep(
        fitting_layers(free), f"{size / 1e9:.1f} GB of base, {free / 1e9:.1f} GB of GPU memory free"
    )


def _requested_count(requested: str, total: int) -> int:
    if requested in ("all", "none"):
        return total if requested == "all" else 0
    if not requested.isdecimal() or int(requested) > total:
        raise ArgumentError(
            f"--resident_layers {requested}: give auto, all, none, or a number up to {total}, the "
            "layers this model has."
        )
    return int(requested)


def _spread(count: int, total: int) -> frozenset[int]:
    """`count` of `total` indices, evenly."""
    return frozenset(index * total // count for index in range(count))


def least_free_memory(device: torch.device) -> int:
    """Free bytes of the rank that has the least; a collective call."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return least_of_ranks(int(free), device=device)
