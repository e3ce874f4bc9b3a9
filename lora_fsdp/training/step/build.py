"""The step that was chosen, ready to run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.placement.memory import LargestSequence
from lora_fsdp.placement.step import Step
from lora_fsdp.training.step.captured import CapturedStep
from lora_fsdp.training.step.eager import EagerStep
from lora_fsdp.training.step.objectives.objective import Objective


def build_step(
    step: Step,
    packed: PackedModel,
    *,
    largest: LargestSequence,
    gathers: bool,
    objective: Objective,
    adapter: AdapterSet,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> EagerStep:
    """What carries out a step.

    Args:
        step: that was chosen.
        packed: the model with its adapter.
        largest: what the largest packed sequence is expected to have.
        gathers: whether the step gathers layers.
        objective: what is minimised.
        adapter: where the gradients go.
        device: where sequences are computed.
        autocast: the context of the forward.
    """
    kind: Callable[..., EagerStep] = EagerStep
    if step.is_captured:
        kind = partial(CapturedStep, largest=largest, gathers=gathers)
    return kind(packed, objective=objective, adapter=adapter, device=device, autocast=autocast)
