"""How much of the frozen base every rank keeps whole.

A frozen weight never changes, so a layer that every rank holds whole ("resident") is never gathered
again. With all layers resident a step communicates nothing but the adapter's gradients; with none
the YAML's FSDP shards everything. In between, resident layers are spread evenly among the sharded
ones, so that there is work behind which the next layer's gather can hide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_fsdp.errors import ArgumentError, FsdpSettingError
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.layout import Layout
from lora_fsdp.placement.memory import LargestSequence, device_memory
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.shape import ModelShape


@dataclass(frozen=True)
class Residency:
    """How many layers stay, and why in words."""

    layers: int
    reason: str


def check_replicas(hardware: Hardware, request: Request) -> None:
    """Refuse copies of the base that the ranks cannot share evenly.

    Raises:
        FsdpSettingError: says which number would do.
    """
    replicas = 1 if request.fsdp is None else request.fsdp.replicas
    if hardware.ranks % replicas:
        raise FsdpSettingError(
            f"dp_replicate_size {replicas} (the YAML's parallelism_config): {hardware.ranks} "
            f"processes cannot share {replicas} copies of the base evenly: set it to the number "
            f"of machines, {hardware.hosts}."
        )


def asked_layers(total: int, request: Request) -> int | None:
    """The number of resident layers that is asked for, of `total`; `None` = by memory.

    Raises:
        ArgumentError: a number of layers that the model does not have, or that the YAML rules out.
    """
    asked, fsdp = request.resident_layers, request.fsdp
    if fsdp is None:
        if asked not in ("auto", "all"):
            raise ArgumentError(
                f"--resident_layers {asked} needs an accelerate YAML with FSDP; without FSDP "
                "every rank keeps the whole base."
            )
        return total
    if asked == "auto":
        return None
    count = {"all": total, "none": 0}.get(asked, int(asked) if asked.isdecimal() else -1)
    if not 0 <= count <= total:
        raise ArgumentError(
            f"--resident_layers {asked}: give auto, all, none, or a number up to {total}, the "
            "layers this model has."
        )
    if not fsdp.wrap_layers and 0 < count < total:
        raise ArgumentError(
            f"--resident_layers {asked} needs layers that are sharded one by one: set "
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP in the accelerate YAML."
        )
    if fsdp.offload and count == total:
        raise ArgumentError(
            f"--resident_layers {asked} keeps the whole base on every GPU, and the YAML's "
            "fsdp_offload_params: true keeps it in host memory: drop one."
        )
    return count


def choose_residency(
    shape: ModelShape,
    least: Layout,
    hardware: Hardware,
    request: Request,
    *,
    largest: LargestSequence,
) -> Residency:
    """How many layers every rank keeps; in `least` as few are resident as can be."""
    asked = asked_layers(shape.layers, request)
    if request.fsdp is None:
        return Residency(shape.layers, "no FSDP was asked for")
    if asked is not None:
        return Residency(asked, f"--resident_layers {request.resident_layers}")
    if least.replicas > 1 and least.sharers == 1 and not request.fsdp.offload:
        return Residency(shape.layers, "a copy of the base for each rank")
    if hardware.free is None:
        return Residency(0, "a rehearsal shards as the YAML says")
    if request.fsdp.offload:
        return Residency(0, "the YAML offloads the base to host memory")
    count = layers_that_fit(shape, least, largest, free=hardware.free)
    if count < shape.layers and least.one_group:
        count = 0
    size = shape.base_bytes(quantized=least.quantized)
    return Residency(
        count, f"{size / 1e9:.1f} GB of base, {hardware.free / 1e9:.1f} GB of GPU memory free"
    )


def layers_that_fit(
    shape: ModelShape, layout: Layout, largest: LargestSequence, *, free: int
) -> int:
    """How many layers every rank can keep whole within `free` bytes, context not counted; what else
    `layout` says stays.
    """
    for layers in range(shape.layers, 0, -1):
        kept = with_head_placed(shape, replace(layout, resident_layers=layers), largest)
        if device_memory(shape, kept, largest).allocated <= free:
            return layers
    return 0


def with_head_placed(shape: ModelShape, layout: Layout, largest: LargestSequence) -> Layout:
    """`layout` with the output head whole on every rank, if that takes less at the peak.

    A gathered head is there twice, and on few ranks its shard is a large part of it: with large
    vocabularies that is the peak. What is offloaded stays in host memory.
    """
    sharded = layout.resident_layers < shape.layers and not layout.offloaded
    if not sharded or layout.one_group or not shape.head_parameters:
        return layout
    whole = replace(layout, whole_head=True)
    needed = [device_memory(shape, one, largest).allocated for one in (whole, layout)]
    return whole if needed[0] <= needed[1] else layout
