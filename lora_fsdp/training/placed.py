"""A prepared run put in place: its model where it stays, and the step that computes with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.compute.attention import avoid_kernels_planned_by_shape
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import sample_of
from lora_fsdp.data.workload import Work
from lora_fsdp.distributed.sharding import release_gathered
from lora_fsdp.placement.decide import Placement
from lora_fsdp.training.checks import check_weights
from lora_fsdp.training.placing import check_examples_apart, place_for_training
from lora_fsdp.training.prepared import PreparedRun
from lora_fsdp.training.recomputing import enable_checkpointing, recompute_without_random_state
from lora_fsdp.training.step.captured import CapturedStep
from lora_fsdp.training.step.eager import EagerStep
from lora_fsdp.training.step.objectives.objective import Objective


@dataclass(frozen=True)
class PlacedRun:
    """What a trainer computes with, the same on every rank.

    Attributes:
        placement: how the run computes.
        packed: the model where it stays, with what was patched on it.
        adapter: the run's adapters, equal on all ranks.
        step: forward and backward of a step's packed sequences.
        work: what training computes on each rank.
    """

    placement: Placement
    packed: PackedModel
    adapter: AdapterSet
    step: EagerStep
    work: Work


def place_run(
    run: PreparedRun,
    args: FineTuningArguments,
    *,
    objective: Objective,
    longest: int,
    autocast: Callable[[], AbstractContextManager[None]],
) -> PlacedRun:
    """Put base and adapter where they stay, and make the step: a collective call.

    Args:
        run: as `prepare_run` left it.
        args: the run's.
        objective: what is minimised.
        longest: the longest example in tokens.
        autocast: what the step computes in.

    Raises:
        ArgumentError, UnsupportedModelError: the run cannot be computed as it was asked for.
    """
    avoid_kernels_planned_by_shape()
    settings = run.request.fsdp
    placement, packed = place_for_training(
        run.model,
        request=run.request,
        device=args.device,
        work=run.work,
        longest=longest,
        stored=run.stored,
    )
    recomputed = placement.layout.recomputed
    if recomputed and placement.step.is_captured:
        recompute_without_random_state(args)
    # What the arguments ask for, the Trainer itself switches on.
    enables_checkpointing = recomputed and not args.gradient_checkpointing
    if enables_checkpointing:
        enable_checkpointing(packed, args, settings)
    adapter = AdapterSet.of(run.model)
    adapter.broadcast()
    adapter.check_equal()
    check_weights(run.model)
    planned = placement.packing.packing
    placement = check_examples_apart(
        packed,
        placement,
        request=run.request,
        device=args.device,
        sample=sample_of(run.train, objective.tree, tokens=placement.largest_tokens),
        work=run.work_as,
    )
    packing = placement.packing.packing
    work = run.work if packing is planned else run.work_as(packing)
    # It was taken back with all that was changed for packed sequences.
    if packing.is_apart and enables_checkpointing:
        enable_checkpointing(packed, args, settings)
    release_gathered(run.model)
    step = _kind_of_step(placement)(
        packed, objective=objective, adapter=adapter, device=args.device, autocast=autocast
    )
    _tell_the_trainer(packed, adapter)
    return PlacedRun(placement, packed, adapter, step, work)


def _kind_of_step(placement: Placement) -> Callable[..., EagerStep]:
    if not placement.step.is_captured:
        return EagerStep
    return partial(CapturedStep, largest=placement.largest, gathers=not placement.is_whole)


def _tell_the_trainer(packed: PackedModel, adapter: AdapterSet) -> None:
    """Have `transformers.Trainer` and accelerate leave alone what is done here."""
    packed.patches.set(
        packed.model,
        "zero_grad",
        adapter.drop_gradients,
        why="gradients are dropped without a walk through the frozen base",
    )
    packed.patches.set(
        packed.model,
        "_is_accelerate_prepared",
        True,
        why="accelerate must not wrap the model in DDP: the steps sum the gradients",
    )
