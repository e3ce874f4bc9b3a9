"""The step that was chosen, ready to run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.compute.label_head import RowComputation
from lora_fsdp.placement.memory import LargestSequence
from lora_fsdp.placement.step import Step
from lora_fsdp.training.step.captured import CapturedStep
from lora_fsdp.training.step.eager import EagerStep


def build_step(
    step: Step,
    model: nn.Module,
    *,
    largest: LargestSequence,
    gathers: bool,
    computation: RowComputation,
    adapter: AdapterSet,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> EagerStep:
    """What carries out a step.

    Args:
        step: that was chosen.
        model: the model with its adapter.
        largest: what the largest row is expected to have.
        gathers: whether the step gathers layers.
        computation: how it computes rows.
        adapter: where the gradients go.
        device: where rows are computed.
        autocast: the context of the forward.
    """
    kind: Callable[..., EagerStep] = EagerStep
    if step.is_captured:
        kind = partial(CapturedStep, largest=largest, gathers=gathers)
    return kind(model, computation=computation, adapter=adapter, device=device, autocast=autocast)
