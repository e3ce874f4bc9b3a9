"""How a run computes: which layers stay, how long rows are, which step, decided once and said once.

Everything here is a choice between ways that give the same gradients; `TrainingPlan` holds what was
chosen and why.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.streaming import StoredBase
from lora_fsdp.compute.fusing import Fusing
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.workload import Work
from lora_fsdp.distributed.residency import Residency, least_free_memory, plan_residency
from lora_fsdp.distributed.sharding import check_placement, layers_to_shard, place_model
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.counting import shape_of
from lora_fsdp.placement.memory import (
    LONGEST_SEQUENCE,
    USUAL_SEQUENCE,
    LargestSequence,
    Placement,
    device_memory,
    largest_sequence,
    layers_that_fit,
    longest_sequence,
    peak_allocated,
    with_head_placed,
)
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.training.step.choice import (
    CAPTURED,
    choose_step,
    why_gathers_stay_out,
    why_not_captured,
    why_run_not_fused,
)


@dataclass(frozen=True)
class TrainingPlan:
    """What was chosen.

    Attributes:
        residency: which layers every rank keeps whole.
        step: `eager`, `fused`, `compiled` or `graph`.
        step_reason: why, in words.
        max_tokens_per_row: longest packed row in tokens.
        packed: the model, with what was patched on it.
        placement: how the base lies, for the memory and time that are foretold.
        shape: the model's sizes; `None` on a CPU, whose memory nothing is planned by.
        rows: the largest row of a step.
        recomputing: why activations are recomputed though nobody asked for it; empty if not.
    """

    residency: Residency
    step: str
    step_reason: str
    max_tokens_per_row: int
    packed: PackedModel
    placement: Placement
    shape: ModelShape | None
    rows: LargestSequence
    recomputing: str = ""

    @property
    def peak_memory(self) -> int | None:
        """The bytes that torch is foretold to name as its peak on each GPU."""
        if self.shape is None:
            return None
        return peak_allocated(self.shape, self.placement, self.rows)

    @property
    def is_captured(self) -> bool:
        """Whether steps are CUDA graphs."""
        return self.step in CAPTURED

    def __str__(self) -> str:
        lines = [
            f"  base      {self.residency}",
            f"  step      {self.step}: {self.step_reason}",
            f"  rows      up to {self.max_tokens_per_row} tokens",
        ]
        if self.recomputing:
            lines.append(f"  backward  recomputes activations: {self.recomputing}")
        if self.shape is not None and self.peak_memory is not None:
            lines.append(f"  memory    {self.peak_memory / 1e9:.1f} GB at the peak, foretold")
            if not self.residency.is_whole:
                whole = replace(self.placement, resident_layers=self.shape.layers, offloaded=False)
                needed = device_memory(self.shape, whole, self.rows).total / 1e9
                lines.append(
                    f"  faster    on GPUs of {needed:.0f} GB, where every rank keeps the whole base"
                )
        return "\n".join(lines)


def place_for_training(
    model: PeftModel,
    *,
    args: FineTuningArguments,
    settings: FsdpSettings | None,
    autocast: bool,
    work: Work | None,
    longest_example: int,
    stored: StoredBase | None = None,
) -> TrainingPlan:
    """Choose, then fuse the layers and put the model in place accordingly.

    A collective call. Layers are fused before they are sharded, and compared with the originals
    where the weights lie now, or on a copy of one layer if they have not been read yet.

    Args:
        model: base and adapter, in host memory; the base perhaps without its weights.
        args: the run's arguments.
        settings: the YAML's FSDP settings.
        autocast: whether the forward runs under autocast.
        work: what training will compute; `None` = nothing.
        longest_example: in tokens.
        stored: where the base's weights are to be read from, if they have not been.
    """
    base, device = base_model(model), args.device
    layers = layers_to_shard(base, names=settings.layer_classes if settings else None)
    packed = _fused_if_can_be(model, layers, args=args, autocast=autocast, stored=stored)
    is_fused = packed.fusing.is_fused
    shape = _shape(model, fuse=is_fused) if device.type == "cuda" else None
    work = work or _NO_WORK
    gathers_stay_out = why_gathers_stay_out(args, settings)
    placement, recomputing = _choose_placement(
        model,
        args,
        settings,
        layers=len(layers),
        shape=shape,
        is_fused=is_fused,
        gathers_captured=gathers_stay_out is None,
        shortest=largest_sequence(work, max(longest_example, args.max_tokens_per_row or 0)),
    )
    residency = _choose_residency(
        base,
        layers,
        args=args,
        settings=settings,
        shape=shape,
        least=placement,
        rows=largest_sequence(
            work, max(longest_example, args.max_tokens_per_row or USUAL_SEQUENCE)
        ),
    )
    resident = place_model(
        model,
        settings=settings,
        residency=residency,
        device=device,
        world_size=args.world_size,
        stored=stored,
    )
    check_placement(model, resident=resident)
    uncaptured = why_not_captured(
        model, args, settings, is_fused=is_fused, recomputed=placement.recomputed
    )
    if uncaptured is None and not residency.is_whole:
        uncaptured = gathers_stay_out
    # At a third of what an H100 can do.
    seconds = 4.0 * model.num_parameters() * work.step_tokens * work.steps(args.world_size) / 3e14
    step, reason = choose_step(
        args,
        fusing=packed.fusing,
        why_not_captured=uncaptured,
        seconds=seconds,
    )
    if is_fused and residency.is_whole:
        packed.join_weights()
        if step in CAPTURED:  # launched one by one, products leave no room to unpack beside them
            packed.unpack_ahead(recomputed=placement.recomputed)
    if step == "compiled":
        packed.compile(layers)
    packed.shortened_last_layer = not placement.recomputed
    sequence_length = args.max_tokens_per_row or _sequence_length(
        shape,
        device=device,
        longest_example=longest_example,
        recomputed=placement.recomputed,
        # Only fused layers compute long rows by blocks.
        most=LONGEST_SEQUENCE if is_fused else USUAL_SEQUENCE,
    )
    return TrainingPlan(
        residency=residency,
        step=step,
        step_reason=reason,
        max_tokens_per_row=sequence_length,
        packed=packed,
        placement=replace(
            placement,
            resident_layers=len(residency.indices),
            whole_head=residency.head is not None,
        ),
        shape=shape,
        rows=largest_sequence(work, sequence_length),
        recomputing=recomputing,
    )


def _choose_placement(
    model: PeftModel,
    args: FineTuningArguments,
    settings: FsdpSettings | None,
    *,
    layers: int,
    shape: ModelShape | None,
    is_fused: bool,
    gathers_captured: bool,
    shortest: LargestSequence,
) -> tuple[Placement, str]:
    """How the base lies where as few layers are resident as can be, and why activations are
    recomputed though nobody asked for it (empty if they are not). A collective call.

    Args:
        model: base and adapter, the base perhaps on the device already.
        args: the run's arguments.
        settings: the YAML's FSDP settings.
        layers: of the model.
        shape: of the model; `None` on a CPU.
        is_fused: fused layers compute.
        gathers_captured: a CUDA graph may hold a step in which layers are gathered.
        shortest: the shortest that rows can be limited to.
    """
    base = base_model(model)

    def is_captured(*, recomputed: bool) -> bool:
        reason = why_not_captured(model, args, settings, is_fused=is_fused, recomputed=recomputed)
        return reason is None

    least = least_placement(
        args,
        settings,
        layers=layers,
        ranks=args.world_size,
        quantized=bool(getattr(base, "is_loaded_in_4bit", False)),  # set by transformers, or by us
    )
    least = replace(
        least,
        captured=is_captured(recomputed=least.recomputed),
        gathers_captured=gathers_captured,
    )
    recomputing = _why_recompute(shape, least, shortest, base=base, device=args.device)
    if recomputing:
        least = replace(least, recomputed=True, captured=is_captured(recomputed=True))
    return least, recomputing


def _choose_residency(
    base: PreTrainedModel,
    layers: Sequence[nn.Module],
    *,
    args: FineTuningArguments,
    settings: FsdpSettings | None,
    shape: ModelShape | None,
    least: Placement,
    rows: LargestSequence,
) -> Residency:
    """Which layers every rank keeps, and whether it keeps the output head. A collective call.

    Args:
        base: the base model, not yet on the device.
        layers: those that FSDP would shard one by one.
        args: the run's arguments.
        settings: the YAML's FSDP settings.
        shape: of the model; `None` on a CPU.
        least: where as few layers are resident as can be.
        rows: the largest of a step.
    """
    residency = plan_residency(
        args.resident_layers,
        layers,
        base,
        settings=settings,
        device=args.device,
        fitting_layers=lambda free: layers_that_fit(
            cast(ModelShape, shape), least, rows, free=free
        ),
    )
    if shape is None:
        return residency
    chosen = replace(least, resident_layers=len(residency.indices))
    head = base.get_output_embeddings()
    if head is None or not with_head_placed(shape, chosen, rows).whole_head:
        return residency
    return residency.with_head(head)


def least_placement(
    args: FineTuningArguments,
    settings: FsdpSettings | None,
    *,
    layers: int,
    ranks: int,
    quantized: bool,
) -> Placement:
    """How the base lies where as few layers are resident as the arguments allow.

    Args:
        args: the run's.
        settings: the YAML's FSDP settings.
        layers: of the model.
        ranks: that share it.
        quantized: its linear layers are stored in 4 bits.
    """
    asked = args.resident_layers
    resident = min(layers, int(asked)) if asked.isdecimal() else 0
    return Placement(
        ranks=ranks,
        resident_layers=layers if settings is None or asked == "all" else resident,
        kept_until_backward=bool(settings and not settings.reshard_after_forward),
        one_group=bool(settings and not settings.wrap_layers),
        offloaded=bool(settings and settings.offload),
        quantized=quantized,
        recomputed=args.gradient_checkpointing
        or bool(settings and settings.activation_checkpointing),
    )


def _fused_if_can_be(
    model: PeftModel,
    layers: Sequence[nn.Module],
    *,
    args: FineTuningArguments,
    autocast: bool,
    stored: StoredBase | None,
) -> PackedModel:
    """The model, its layers fused if they can be."""
    packed = PackedModel(model)
    if reason := why_run_not_fused(model, args, autocast=autocast):
        packed.fusing = Fusing(reason=reason)
    else:
        packed.fuse(layers, filled_copy=stored.filled_copy if stored else None)
    if args.step == "fused" and not packed.fusing.is_fused:
        raise ArgumentError(f"--step fused: {packed.fusing.reason}. Use --step auto.")
    return packed


def _why_recompute(
    shape: ModelShape | None,
    least: Placement,
    rows: LargestSequence,
    *,
    base: nn.Module,
    device: torch.device,
) -> str:
    """Why activations must be recomputed; empty if they need not, or are anyway. A collective call.

    Not before nothing else fits: recomputing costs half of a step's products once more, which is
    more than gathering layers does.

    Args:
        shape: of the model; `None` on a CPU.
        least: where as few layers are resident as can be.
        rows: the shortest that rows can be limited to.
        base: the base, perhaps on the device already.
        device: where the run computes.
    """
    if shape is None or least.recomputed:
        return ""
    needed = device_memory(shape, with_head_placed(shape, least, rows), rows).allocated
    on_device = sum(p.nbytes for p in base.parameters() if p.device == device)
    free = least_free_memory(device) + on_device
    if needed <= free:
        return ""
    return (
        f"with a row of {rows.tokens} tokens a step would need {needed / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB are free"
    )


def _sequence_length(
    shape: ModelShape | None,
    *,
    device: torch.device,
    longest_example: int,
    recomputed: bool,
    most: int,
) -> int:
    """The longest row that memory allows, the same on every rank; a collective call on GPUs."""
    if shape is None:
        return max(USUAL_SEQUENCE, longest_example)
    free = least_free_memory(device)
    return longest_sequence(
        shape, free=free, longest_example=longest_example, recomputed=recomputed, most=most
    )


def _shape(model: PeftModel, *, fuse: bool) -> ModelShape:
    """The sizes of the model, counted on a copy without numbers."""
    base = base_model(model)
    with torch.device("meta"):
        skeleton = type(base)._from_config(copy.deepcopy(base.config), dtype=torch.bfloat16)
    skeleton.tie_weights()
    adapter = cast(LoraConfig, model.peft_config[str(model.active_adapter)])
    return shape_of(skeleton, adapter, fuse=fuse)


# For a model that is only evaluated.
_NO_WORK = Work(
    examples=0,
    examples_per_rank=1,
    step_tokens=1,
    step_labels=1,
    largest_step=1,
    longest_example=1,
)
