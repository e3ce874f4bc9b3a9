"""A run's placement: decided from its arguments and its model, then carried out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from lora_fsdp.adapter.attach import has_dropout
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.streaming import StoredBase
from lora_fsdp.compute.architectures import why_apart, windows_of
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import Packing, Tree
from lora_fsdp.data.workload import NO_WORK, Work
from lora_fsdp.distributed.captured_gathers import why_gathers_not_captured
from lora_fsdp.distributed.sharding import check_placement, layers_to_shard, place_model
from lora_fsdp.placement.decide import Placement, decide, with_packing
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.placement.step import Step
from lora_fsdp.sizing.counting import shape_of
from lora_fsdp.sizing.hardware import hardware_here
from lora_fsdp.sizing.packing import checked_packing

# A sweep counts the same model for each of its runs.
_COUNTED: dict[tuple[type, str], ModelShape] = {}


def place_for_training(
    model: PeftModel,
    *,
    request: Request,
    device: torch.device,
    work: Work,
    longest: int,
    stored: StoredBase | None = None,
) -> tuple[Placement, PackedModel]:
    """Decide, then fuse the layers and put the model in place accordingly.

    A collective call. Nothing of the base is read before it is decided. Layers are fused before
    they are sharded, and compared with the originals where the weights lie now, or on a copy of one
    layer if they have not been read yet; where they compute something else, it is decided again.

    Args:
        model: base and adapter, in host memory; the base perhaps without its weights.
        request, work: what the run asks for, and will compute.
        device: where.
        longest: the longest example in tokens.
        stored: where the base's weights are to be read from, if they have not been.

    Returns:
        what was decided; and the model where it stays, with what was patched on it.
    """
    base, settings = base_model(model), request.fsdp
    layers = layers_to_shard(base, names=settings.layer_classes if settings else None)
    hardware = hardware_here(device, base=base)
    placement = decide_for_run(model, work, hardware, request)
    packed = PackedModel(model)
    packed.windows = windows_of(base, longest=longest)
    if placement.shape.is_fused:
        packed.fuse(layers, filled_copy=stored.filled_copy if stored else None)
        if not packed.fusing.is_fused:
            stay = packed.fusing.reason
            placement = decide_for_run(model, work, hardware, request, stay=stay)
    layout = placement.layout
    resident = place_model(
        model, layers=layers, layout=layout, settings=settings, device=device, stored=stored
    )
    check_placement(model, resident=resident)
    _prepare_layers(packed, layers, placement)
    return placement, packed


def decide_for_run(
    model: PeftModel, work: Work, hardware: Hardware, request: Request, *, stay: str | None = None
) -> Placement:
    """What is decided for a model with its adapter; a collective call.

    `stay` says why the model's own layers are to compute, if that was found out.
    """
    packed = not request.packing_choice.packing.is_apart
    shape = count(model, stay=request.why_not_fused or stay, packed=packed)
    placement = decide(shape, work, hardware, request)
    gathers_in_graphs = placement.step is Step.GRAPH and not placement.is_whole
    if gathers_in_graphs and hardware.free is not None:
        reason = why_gathers_not_captured(torch.device("cuda", torch.cuda.current_device()))
        tried = replace(hardware, why_gathers_not_captured=reason)
        placement = decide(shape, work, tried, request)
    return placement


def check_examples_apart(
    packed: PackedModel,
    placement: Placement,
    *,
    request: Request,
    device: torch.device,
    sample: Sequence[Tree],
    work: Callable[[Packing], Work],
) -> Placement:
    """Ask the placed model whether examples are computed as if each stood alone, and decide anew
    how they are laid into sequences where they are not. A collective call.

    Args:
        packed, placement, request, device: of `place_for_training`.
        sample: examples of the run, as many as a packed sequence of it holds.
        work: what the run computes, packed or not.

    Raises:
        UnsupportedModelError: packing was asked for, and changes what the model computes; or that
            is not finite.
    """
    choice = checked_packing(
        packed, placement.packing, asked=request.packing, device=device, sample=sample
    )
    if choice == placement.packing:
        return placement
    asked = replace(request, why_apart=choice.reason)
    shape = count(cast(PeftModel, packed.model), stay=asked.why_not_fused, packed=False)
    hardware = hardware_here(device, base=packed.base)
    if placement.free is not None:  # what the model takes by now was free before
        hardware = replace(hardware, free=placement.free)
    return with_packing(placement, choice, shape, work(choice.packing), hardware, asked)


def check_can_be_placed(
    skeleton: PreTrainedModel,
    adapter: LoraConfig,
    args: FineTuningArguments,
    *,
    settings: FsdpSettings | None,
) -> None:
    """Refuse what `decide` would refuse of a base that must be loaded whole; a collective call.

    Args:
        skeleton: the base on the meta device; of no further use.
        adapter: what will be attached.
        args: the run's arguments.
        settings: the YAML's FSDP settings.

    Raises:
        ArgumentError: what was asked for cannot be.
    """
    request = Request.of(
        vars(args),
        fsdp=settings,
        quantized=False,
        autocast=args.mixed_precision != "no",
        config=skeleton.config,
        lora_dropout=bool(adapter.lora_dropout),
        why_apart=why_apart(skeleton),
    )
    packed = not request.packing_choice.packing.is_apart
    shape = shape_of(skeleton, adapter, stay=request.why_not_fused, packed=packed)
    decide(shape, NO_WORK, hardware_here(args.device, base=skeleton), request)


def request_of_run(
    model: PeftModel, args: FineTuningArguments, *, settings: FsdpSettings | None
) -> Request:
    """What a run asks for with the YAML's FSDP `settings`, and what its model brings along."""
    base = base_model(model)
    return Request.of(
        vars(args),
        fsdp=settings,
        quantized=bool(getattr(base, "is_loaded_in_4bit", False)),  # set by transformers, or by us
        autocast=args.mixed_precision != "no",  # also where the accelerate YAML says so
        config=base.config,
        lora_dropout=has_dropout(model),
        why_apart=why_apart(base),
    )


def count(model: PeftModel, *, stay: str | None, packed: bool) -> ModelShape:
    """The sizes of a model, counted on a copy without numbers; once for all runs that are alike."""
    base = base_model(model)
    adapter = cast(LoraConfig, model.peft_config[str(model.active_adapter)])
    attention = base.config._attn_implementation  # of which `to_dict` says nothing
    asked = (base.config.to_dict(), attention, base.dtype, adapter.to_dict(), stay, packed)
    alike = (type(base), repr(asked))
    if alike not in _COUNTED:
        _COUNTED[alike] = _count(base, adapter, stay=stay, packed=packed)
    return _COUNTED[alike]


def _count(
    base: PreTrainedModel, adapter: LoraConfig, *, stay: str | None, packed: bool
) -> ModelShape:
    with torch.device("meta"), no_init_weights():
        skeleton = type(base)._from_config(copy.deepcopy(base.config), dtype=base.dtype)
    skeleton.tie_weights()
    return shape_of(skeleton, adapter, stay=stay, packed=packed)


def _prepare_layers(packed: PackedModel, layers: Sequence[nn.Module], placement: Placement) -> None:
    """What is done to layers once they lie where they stay."""
    recomputed = placement.layout.recomputed
    if placement.is_whole and packed.fusing.is_fused:
        packed.join_weights()
        # Launched one by one, matmuls leave no room to unpack beside them.
        if placement.step.is_captured:
            packed.unpack_ahead(recomputed=recomputed)
    if placement.step is Step.COMPILED:
        packed.compile(layers)
    packed.is_recomputed = recomputed
    packed.shortened_last_layer = not recomputed
