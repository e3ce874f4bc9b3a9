"""The FSDP status, read off the live model: what is sharded, what is replicated, who holds what."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.ranks import from_every_rank, rank


@dataclass(frozen=True)
class RankStatus:
    """What one rank holds; sizes in bytes."""

    rank: int
    device: str
    base_parameters: int
    base_bytes: int
    adapter_parameters: int
    adapter_bytes: int


@dataclass(frozen=True)
class FsdpStatus:
    """The whole run's placement; `groups` counts the sharded modules by class."""

    ranks: list[RankStatus]
    groups: dict[str, int]
    base_parameters: int
    base_dtype: str
    adapter_dtype: str

    def __str__(self) -> str:
        how = ", ".join(f"{count} x {name}" for name, count in self.groups.items())
        lines = [
            f"FSDP status: {len(self.ranks)} process(es)",
            f"  base     {_millions(self.base_parameters)} parameters, {self.base_dtype}, "
            + (f"sharded by FSDP2 in groups: {how}" if how else "whole on every rank"),
            f"  adapter  {_millions(self.ranks[0].adapter_parameters)} parameters, "
            f"{self.adapter_dtype}, replicated on every rank",
            "  rank  device    base parameters      base size   adapter size",
        ]
        lines += [
            f"  {r.rank:>4}  {r.device:<8}  {_millions(r.base_parameters):>15}"
            f"  {_megabytes(r.base_bytes):>13}  {_megabytes(r.adapter_bytes):>13}"
            for r in self.ranks
        ]
        return "\n".join(lines)


def fsdp_status(model: PeftModel) -> FsdpStatus:
    """The status of `model`; a collective call, the same answer on every rank."""
    adapter = trainable_parameters(model)
    base = [p for name, p in model.named_parameters() if name not in adapter]
    mine = RankStatus(
        rank=rank(),
        device=str(_local(base[0]).device),
        base_parameters=sum(_local(p).numel() for p in base),
        base_bytes=sum(_local(p).nbytes for p in base),
        adapter_parameters=sum(p.numel() for p in adapter.values()),
        adapter_bytes=sum(p.nbytes for p in adapter.values()),
    )
    groups = Counter(
        # `fully_shard` puts FSDPModule in front of the module's own class.
        type(module).__mro__[2].__name__
        for module in model.modules()
        if isinstance(module, FSDPModule)
    )
    return FsdpStatus(
        ranks=from_every_rank(mine),
        groups=dict(groups),
        base_parameters=sum(p.numel() for p in base),
        base_dtype=_dtype_name(base),
        adapter_dtype=_dtype_name(list(adapter.values())),
    )


def _local(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _dtype_name(parameters: list[nn.Parameter]) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
