"""The FSDP status, read off the live model: what is sharded, what is replicated, who holds what."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.placement.network import NO_TRAFFIC, HostTraffic
from lora_fsdp.ranks import from_every_rank, host, rank


@dataclass(frozen=True)
class RankStatus:
    """What one rank holds; sizes in bytes."""

    rank: int
    host: int
    device: str
    base_parameters: int
    base_bytes: int
    adapter_parameters: int
    adapter_bytes: int


@dataclass(frozen=True)
class FsdpStatus:
    """The whole run's placement.

    Attributes:
        ranks: what each holds.
        groups: counts the sharded modules by class.
        base_parameters, base_dtype, adapter_dtype: of the model.
        mesh: sizes of the mesh that the base is sharded over, by the dimension's name; empty where
            nothing is sharded.
        traffic: what each host sends to others in a step, predicted.
    """

    ranks: list[RankStatus]
    groups: dict[str, int]
    base_parameters: int
    base_dtype: str
    adapter_dtype: str
    mesh: dict[str, int] = field(default_factory=dict)
    traffic: HostTraffic = NO_TRAFFIC

    @property
    def hosts(self) -> int:
        """Machines."""
        return 1 + max(one.host for one in self.ranks)

    def __str__(self) -> str:
        how = ", ".join(f"{count} x {name}" for name, count in self.groups.items())
        where = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        lines = [
            f"FSDP status: {len(self.ranks)} process(es){where}",
            f"  base     {_millions(self.base_parameters)} parameters, {self.base_dtype}, "
            + (f"sharded by FSDP2 in groups: {how}" if how else "whole on every rank"),
            f"  adapter  {_millions(self.ranks[0].adapter_parameters)} parameters, "
            f"{self.adapter_dtype}, replicated on every rank",
            *self._of_several_hosts(),
            f"  rank  {self._host('host')}device    base parameters      base size   adapter size",
        ]
        lines += [
            f"  {r.rank:>4}  {self._host(r.host)}{r.device:<8}  {_millions(r.base_parameters):>15}"
            f"  {_megabytes(r.base_bytes):>13}  {_megabytes(r.adapter_bytes):>13}"
            for r in self.ranks
        ]
        return "\n".join(lines)

    def _host(self, text: object) -> str:
        return f"{text:>4}  " if self.hosts > 1 else ""

    def _of_several_hosts(self) -> list[str]:
        lines = []
        if len(self.mesh) > 1:
            copies, sharers = self.mesh.values()
            lines.append(
                f"  mesh     {copies} copies of what is sharded, each in shards of {sharers} ranks"
            )
        if self.hosts > 1:
            lines.append(
                f"  network  each host sends {_megabytes(self.traffic.total)} a step to others, "
                f"predicted: {_megabytes(self.traffic.gradients)} of the adapter's gradients, "
                f"{_megabytes(self.traffic.weights)} of the base's weights"
            )
        return lines


def fsdp_status(model: PeftModel, *, traffic: HostTraffic = NO_TRAFFIC) -> FsdpStatus:
    """The status of `model`; a collective call, the same answer on every rank.

    Args:
        model: as it was placed.
        traffic: what each host sends in a step, predicted.
    """
    adapter = trainable_parameters(model)
    base = [p for name, p in model.named_parameters() if name not in adapter]
    mine = RankStatus(
        rank=rank(),
        host=host(),
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
        mesh=_mesh(base),
        traffic=traffic,
    )


def _mesh(parameters: list[nn.Parameter]) -> dict[str, int]:
    sharded = next((p for p in parameters if isinstance(p, DTensor)), None)
    if sharded is None:
        return {}
    mesh = sharded.device_mesh
    names = mesh.mesh_dim_names or ("shard",)
    return dict(zip(names, mesh.shape, strict=True))


def _local(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _dtype_name(parameters: list[nn.Parameter]) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
