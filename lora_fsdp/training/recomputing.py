"""Activations that are recomputed in backward, by transformers' own switch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.compute.packed_model import PackedModel


def enable_checkpointing(
    packed: PackedModel, args: FineTuningArguments, settings: FsdpSettings | None
) -> None:
    """Recompute activations layer by layer, as the YAML asks for or memory.

    By transformers' own switch and not by wrapper modules, which would rename the adapter's
    parameters; `--gradient_checkpointing` is switched on by the Trainer itself. Offloaded, what a
    layer's recomputing starts from (its input) waits in host memory from forward to backward.
    """
    base = packed.base
    # transformers < 5.20 knows the switch by its old name only.
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    kwargs: dict[str, Any] = dict(args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
    # As the Trainer does: these are the switch's own, the others are torch's.
    own = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    with packed.patches.recording(base.modules(), why="activations are recomputed in backward"):
        enable(kwargs or None, **own)
    if settings is None or not settings.activation_offload:
        return
    # transformers' own way to offload pins memory on CPUs too, which fails there.
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            checkpoint = partial(
                _keeping_input_on_host,
                module._gradient_checkpointing_func,  # type: ignore[arg-type]
                device=args.device,
            )
            packed.patches.set(
                module,
                "_gradient_checkpointing_func",
                checkpoint,
                why="what activations are recomputed from waits in host memory",
            )


def recompute_without_random_state(args: FineTuningArguments) -> None:
    """For recomputing in a CUDA graph: it cannot read the state, and holds nothing that draws."""
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    args.gradient_checkpointing_kwargs = kwargs
    if hasattr(args, "activation_checkpointing_kwargs"):  # its name since transformers 5.20
        args.activation_checkpointing_kwargs = kwargs


def _keeping_input_on_host(
    checkpoint: Callable[..., Any], function: Callable[..., Any], *inputs: Any, device: torch.device
) -> Any:
    with torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda"):
        return checkpoint(function, *inputs)
