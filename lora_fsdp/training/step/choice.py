"""Which step a run takes, and why: its own layers, fused or compiled ones, and CUDA graphs of them.

All give the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from peft import PeftModel

from lora_fsdp.adapter.attach import has_dropout
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import base_model
from lora_fsdp.compute.fusing import Fusing
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.distributed.captured_gathers import why_gathers_not_captured
from lora_fsdp.distributed.replication import ReplicatedParameters
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.memory import LargestSequence
from lora_fsdp.training.step.captured import CapturedStep
from lora_fsdp.training.step.eager import EagerStep
from lora_fsdp.training.step.objectives.objective import Objective

#: The steps that are CUDA graphs.
CAPTURED = ("graph", "compiled")
#: Seconds of training from which on compiling the layers (10 s to over a minute) is worth it.
_COMPILATION_PAYS_FROM = 300.0
_GATHERED = "layers are gathered within the step"


def why_run_not_fused(model: PeftModel, args: FineTuningArguments, *, autocast: bool) -> str | None:
    """Why the model's own layers are to compute, in words; `None` = fused ones may."""
    config = base_model(model).config
    if args.step in ("eager", "compiled"):
        return f"--step {args.step}"
    if autocast:
        return "mixed_precision in the accelerate YAML"
    if config._attn_implementation != "sdpa":
        return f"{config._attn_implementation} attention was chosen"
    if getattr(config.get_text_config(), "attention_dropout", 0.0):
        return "the model drops attention weights"
    return None


def why_not_captured(
    model: PeftModel,
    args: FineTuningArguments,
    settings: FsdpSettings | None,
    *,
    is_fused: bool,
    recomputed: bool,
) -> str | None:
    """Why no CUDA graph holds a rank's own part of a step, in words; `None` = one does.

    What gathering layers adds to that is asked of `why_gathers_not_captured`.

    Args:
        model: base and adapter.
        args: the run's arguments.
        settings: the YAML's FSDP settings.
        is_fused: fused layers compute.
        recomputed: activations are recomputed in backward.
    """
    if args.device.type != "cuda":
        return "CUDA graphs need a GPU"
    if args.step in ("eager", "fused"):
        return f"--step {args.step}"
    if not recomputed:
        return None
    if settings is not None and settings.activation_offload:
        return "what activations are recomputed from waits in host memory"
    if args.gradient_checkpointing_kwargs:
        return "activations are recomputed as gradient_checkpointing_kwargs say"
    if not is_fused:
        return "activations are recomputed by the model's own layers"
    if has_dropout(model):
        return "activations are recomputed, with LoRA's dropout as it was drawn"
    return None


def why_gathers_stay_out(args: FineTuningArguments, settings: FsdpSettings | None) -> str | None:
    """Why no CUDA graph holds a step in which layers are gathered; `None` = one does, or none are.

    A collective call.

    Args:
        args: the run's arguments.
        settings: the YAML's FSDP settings; `None` = no FSDP.
    """
    if settings is None:
        return None
    if args.device.type != "cuda" or args.step not in ("auto", "graph"):
        return _GATHERED
    if args.resident_layers == "all":
        return None  # there are none
    if settings.offload:
        return "layers are fetched from host memory within the step"
    if args.step == "auto":
        return f"{_GATHERED}, which only --step graph captures"
    return why_gathers_not_captured(args.device)


def choose_step(
    args: FineTuningArguments,
    *,
    fusing: Fusing,
    why_not_captured: str | None,
    seconds: float,
) -> tuple[str, str]:
    """Name of the step, and why it was chosen.

    Args:
        args: the run's arguments.
        fusing: what came of fusing the layers.
        why_not_captured: why no CUDA graph can hold a step; `None` = one can.
        seconds: that training will take, roughly.

    Raises:
        ArgumentError: the step that was asked for cannot be.
    """
    if args.step in ("eager", "fused"):
        return args.step, f"--step {args.step}"
    if why_not_captured:
        if args.step in ("graph", "compiled"):
            raise ArgumentError(f"--step {args.step}: {why_not_captured}. Use --step auto.")
        if not fusing.is_fused:
            return "eager", f"the model's own layers ({fusing.reason}); {why_not_captured}"
        return "fused", f"fused layers; {why_not_captured}"
    if args.step != "auto":
        return args.step, f"--step {args.step}"
    if fusing.is_fused:
        return "graph", "fused layers, captured as CUDA graphs"
    if seconds > _COMPILATION_PAYS_FROM:
        return (
            "compiled",
            f"a run of some {seconds / 60:.0f} minutes pays for compilation ({fusing.reason})",
        )
    return "graph", f"the model's own layers ({fusing.reason}), captured as CUDA graphs"


def build_step(
    name: str,
    packed: PackedModel,
    *,
    largest: LargestSequence,
    gathers: bool,
    objective: Objective,
    adapter: ReplicatedParameters,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> EagerStep:
    """The step of that name.

    Args:
        name: as `choose_step` gives it.
        packed: the model with its adapter.
        largest: what the largest packed sequence is expected to have.
        gathers: whether the step gathers layers.
        objective: what is minimised.
        adapter: where the gradients go.
        device: where sequences are computed.
        autocast: the context of the forward.
    """
    kind: Callable[..., EagerStep] = EagerStep
    if name in CAPTURED:
        kind = partial(CapturedStep, largest=largest, gathers=gathers)
    return kind(packed, objective=objective, adapter=adapter, device=device, autocast=autocast)
