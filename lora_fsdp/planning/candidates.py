"""The ways in which a base can lie on given GPUs, each with its memory and its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.data.workload import Work
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.decide import Placement, decide
from lora_fsdp.placement.gpus import Gpu
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.memory import DeviceMemory
from lora_fsdp.placement.network import HostTraffic, host_traffic
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.placement.whole_job import RENTED, Job, Machine, job_seconds

#: FSDP as accelerate_configs/fsdp2.yaml asks for it.
SHARDED = FsdpSettings(
    reshard_after_forward=True,
    offload=False,
    activation_checkpointing=False,
    layer_classes=None,
    wrap_layers=True,
)


# Of the predicted bytes: more than any prediction was too low by.
_MARGIN = 0.03


@dataclass(frozen=True)
class Candidate:
    """One way to run on one choice of GPUs: what is asked for, and what is decided then.

    Attributes:
        gpu, count: which GPUs, one rank each, on all hosts together.
        request: what is asked for.
        placement: what a run would decide.
        seconds: of training and scoring, loading not counted.
        cost: in the price's currency; `None` without a price.
        yaml_is_default: whether the YAML is the recipe's, or the one that so many GPUs get.
        work: what each rank computes.
        traffic: what each host sends to others in an optimizer step.
        seconds_by_part: of the whole job (`job_seconds`).
    """

    gpu: Gpu
    count: int
    request: Request
    placement: Placement
    seconds: float
    cost: float | None
    yaml_is_default: bool
    work: Work
    traffic: HostTraffic
    seconds_by_part: Mapping[str, float]

    @property
    def strategy(self) -> str:
        """How the base lies, in words."""
        layout = self.placement.layout
        if layout.offloaded:
            name = "offload"
        elif self.placement.is_whole:
            name = "resident"
        elif layout.resident_layers:
            name = f"{layout.resident_layers} of {self.placement.shape.layers} resident"
        else:
            name = "till backward" if layout.kept_until_backward else "full shard"
        if layout.hosts > 1 and not self.placement.is_whole:
            name += " over all" if layout.reaches_over_hosts else " in each host (hybrid)"
        return name + (", recomputing" if layout.recomputed else "")

    @property
    def memory(self) -> DeviceMemory:
        """Bytes on each GPU."""
        return self.placement.memory

    @property
    def spare(self) -> int:
        """Bytes left of what can be used; less than 0 = it does not fit."""
        usable = self.gpu.memory if self.placement.free is None else self.placement.free
        return usable - self.memory.allocated

    @property
    def fits(self) -> bool:
        """Whether a step's peak fits the GPU."""
        return self.placement.fits

    @property
    def leaves_a_margin(self) -> bool:
        """Whether it fits also if the prediction is off by as much as predictions have been.

        docs/planning.md has the differences that were measured.
        """
        return self.spare >= _MARGIN * self.memory.total

    @property
    def host_bytes(self) -> int:
        """Host memory that offloaded shards take, all ranks together."""
        layout, shape = self.placement.layout, self.placement.shape
        return shape.base_bytes(quantized=layout.quantized) if layout.offloaded else 0

    @property
    def is_compromise(self) -> bool:
        """Whether the base is rounded to 4 bits, or fetched from host memory at every step."""
        return self.placement.layout.quantized or self.placement.layout.offloaded


@dataclass(frozen=True)
class Question:
    """The run that is planned for.

    Attributes:
        model: its name.
        shape: its sizes.
        request: what the recipe asks for on a number of GPUs.
        work: what the run computes on a number of ranks.
        shipped: the accelerate YAMLs that have a name, by it.
        dtype: of the base, in words.
        is_open: whether the accelerate YAML may be another one than the recipe's.
        machine: what the job's time depends on beside the GPUs.
        job: what of it is no part of a step; `None` = the base, read once, and one adapter saved.
    """

    model: str
    shape: ModelShape
    request: Callable[[int], Request]
    work: Callable[[int], Work]
    shipped: Mapping[str, FsdpSettings | None]
    dtype: str = "bfloat16"
    is_open: bool = True
    machine: Machine = RENTED
    job: Job | None = None

    @property
    def whole(self) -> Job:
        """What of the job is no part of a step."""
        return self.job or Job(float(self.shape.base_bytes(quantized=False)))


def candidates(
    question: Question,
    gpu: Gpu,
    count: int,
    *,
    price_per_hour: float | None = None,
    hosts: int = 1,
    link: float = math.inf,
) -> list[Candidate]:
    """What was asked for on `count` GPUs, and what else could be asked for.

    Args:
        question: the run.
        gpu, count: the GPUs, of all hosts together.
        price_per_hour: of one GPU; `None` = no cost.
        hosts: that they are on, evenly.
        link: bytes per second that each host can send to others.

    Raises:
        ArgumentError: what was asked for cannot be.
    """
    shape = question.shape
    if gpu.is_cpu:
        hardware = Hardware.without_gpu(count, hosts=hosts)
    else:
        hardware = Hardware.of(gpu, count, hosts=hosts)
    asked, work = question.request(count), question.work(count)
    found: dict[Placement, Candidate] = {}
    requests = [asked]
    if not gpu.is_cpu:  # a rehearsal is what was asked for
        requests = [*_requests(asked, count, hosts=hosts, is_open=question.is_open)]
    for place, request in enumerate(requests):
        try:
            placement = decide(shape, work, hardware, request)
        except ArgumentError:
            if place == 0:
                raise
            continue  # another one than was asked for
        layout = placement.layout
        if place and layout.replicas > 1 and layout.sharers == 1 and not placement.is_whole:
            continue  # sharded over one rank
        parts = job_seconds(
            shape,
            placement.layout,
            work,
            gpu,
            machine=question.machine,
            job=question.whole,
            sequence_tokens=placement.largest.tokens,
            link=link,
        )
        seconds = parts["train"] + parts["score"]
        sequences = max(1.0, work.step_tokens / placement.largest.tokens)
        traffic = host_traffic(shape, placement.layout, sequences=sequences)
        paid = 1 if gpu.is_cpu else count
        cost = None if price_per_hour is None else price_per_hour * paid * seconds / 3600
        known = replace(placement, residency=replace(placement.residency, reason=""))
        is_default = request.fsdp == asked.fsdp
        found.setdefault(
            known,
            Candidate(
                gpu, count, request, placement, seconds, cost, is_default, work, traffic, parts
            ),
        )
    return list(found.values())


def _requests(asked: Request, count: int, *, hosts: int, is_open: bool) -> Iterator[Request]:
    """What was asked for, then what differs from it where the recipe leaves something open."""
    yield asked
    for quantized in (True,) if asked.quantized else (False, True):
        one = replace(asked, quantized=quantized)
        yield one
        by_memory = asked.resident_layers == "auto"
        if by_memory and asked.fsdp is not None and not asked.fsdp.offload:
            yield replace(one, resident_layers="all")
            yield replace(one, resident_layers="none")
        if not is_open:
            continue
        base = asked.fsdp or SHARDED
        if by_memory and hosts > 1:  # a copy in each host, and one copy over all of them
            for replicas in (hosts, 1):
                other = replace(base, replicas=replicas, reshard_after_forward=True)
                yield replace(one, fsdp=other)
                yield replace(one, fsdp=other, resident_layers="none")
        if by_memory and count > 1:
            kept = replace(base, reshard_after_forward=False)
            yield replace(one, fsdp=kept, resident_layers="none")
        yield replace(one, fsdp=replace(base, reshard_after_forward=True, offload=True))
