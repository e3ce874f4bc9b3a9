"""How a run computes: which layers stay, how long rows are, which step, decided once and said once.

Everything here is a choice between ways that give the same gradients; `TrainingPlan` holds what was
chosen and why.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.distributed.launch import FsdpSettings
from lora_fsdp.distributed.memory import USUAL_ROW, RowMemory, longest_row, row_memory
from lora_fsdp.distributed.replication import ReplicatedParameters
from lora_fsdp.distributed.residency import Residency, plan_residency
from lora_fsdp.distributed.sharding import check_placement, layers_to_shard, place_model
from lora_fsdp.errors import ArgumentError
from lora_fsdp.modeling.adapters import base_model, trainable_parameters
from lora_fsdp.modeling.decoder_layer import FusedLayer, fuse_layers
from lora_fsdp.modeling.label_head import RowComputation, head_can_be_chunked
from lora_fsdp.modeling.streaming import StoredBase
from lora_fsdp.training.step import CapturedStep, EagerStep

#: Seconds of training from which on compiling the layers (some 10 to 60 s) is worth it.
_COMPILATION_PAYS_FROM = 300.0


@dataclass(frozen=True)
class TrainingPlan:
    """What was chosen.

    Attributes:
        residency: which layers every rank keeps whole.
        step: `eager`, `fused`, `compiled` or `graph`.
        step_reason: why, in words.
        max_tokens_per_row: longest packed row in tokens.
        computation: how rows are computed.
    """

    residency: Residency
    step: str
    step_reason: str
    max_tokens_per_row: int
    computation: RowComputation

    @property
    def is_captured(self) -> bool:
        """Whether steps are CUDA graphs."""
        return self.step in ("graph", "compiled")

    def __str__(self) -> str:
        return (
            f"  base      {self.residency}\n"
            f"  step      {self.step}: {self.step_reason}\n"
            f"  rows      up to {self.max_tokens_per_row} tokens"
        )


def place_for_training(
    model: PeftModel,
    *,
    args: FineTuningArguments,
    settings: FsdpSettings | None,
    autocast: bool,
    longest_example: int,
    training_tokens: int,
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
        longest_example: in tokens.
        training_tokens: tokens of the whole run on this rank, about.
        stored: where the base's weights are to be read from, if they have not been.
    """
    base, device = base_model(model), args.device
    layers = layers_to_shard(base, names=settings.layer_classes if settings else None)
    fused = _why_not_fused(model, args, autocast=autocast) or fuse_layers(
        base.base_model, layers, filled_copy=stored.filled_copy if stored else None
    )
    if args.step == "fused" and isinstance(fused, str):
        raise ArgumentError(f"--step fused: {fused}. Use --step auto.")
    # At a third of what an H100 can do.
    seconds = 4.0 * model.num_parameters() * training_tokens / 300e12
    checkpointing = _recomputes(args, settings)
    memory = row_memory(
        base,
        adapter_parameters=sum(p.numel() for p in trainable_parameters(model).values()),
        fused=not isinstance(fused, str),
        checkpointing=checkpointing,
    )
    residency = plan_residency(
        args.resident_layers,
        layers,
        base,
        settings=settings,
        device=device,
        world_size=args.world_size,
        needed_besides=memory.besides(max(longest_example, args.max_tokens_per_row or USUAL_ROW)),
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
    step, reason = _choose_step(args, residency, fused=fused, settings=settings, seconds=seconds)
    by_blocks = not isinstance(fused, str)
    if not isinstance(fused, str) and residency.is_whole:
        for replacement in fused:
            replacement.join_weights()
    if step == "compiled":
        for layer in layers:
            layer.compile(dynamic=True)
    return TrainingPlan(
        residency=residency,
        step=step,
        step_reason=reason,
        max_tokens_per_row=args.max_tokens_per_row
        or _row_length(memory, device=device, longest_example=longest_example, by_blocks=by_blocks),
        computation=RowComputation(
            dtype=base.dtype,
            by_blocks=by_blocks,
            chunked_head=head_can_be_chunked(base),
            last_layer=None if isinstance(fused, str) or checkpointing else fused[-1],
        ),
    )


def build_step(
    plan: TrainingPlan,
    model: nn.Module,
    *,
    computation: RowComputation,
    adapter: ReplicatedParameters,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> EagerStep:
    """The step that `plan` chose."""
    kind = CapturedStep if plan.is_captured and device.type == "cuda" else EagerStep
    return kind(model, computation=computation, adapter=adapter, device=device, autocast=autocast)


def _why_not_fused(model: PeftModel, args: FineTuningArguments, *, autocast: bool) -> str | None:
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


def _choose_step(
    args: FineTuningArguments,
    residency: Residency,
    *,
    fused: list[FusedLayer] | str,
    settings: FsdpSettings | None,
    seconds: float,
) -> tuple[str, str]:
    """Name and reason."""
    if why := _why_not_captured(args, residency, settings):
        if args.step in ("graph", "compiled"):
            raise ArgumentError(f"--step {args.step}: {why}. Use --step auto.")
        if isinstance(fused, str):
            return "eager", f"the model's own layers ({fused}); {why}"
        return "fused", f"fused layers; {why}"
    if args.step != "auto":
        return args.step, f"--step {args.step}"
    if not isinstance(fused, str):
        return "graph", "fused layers, captured as CUDA graphs"
    if seconds > _COMPILATION_PAYS_FROM:
        return (
            "compiled",
            f"a run of some {seconds / 60:.0f} minutes pays for compilation ({fused})",
        )
    return "graph", f"the model's own layers ({fused}), captured as CUDA graphs"


def _why_not_captured(
    args: FineTuningArguments, residency: Residency, settings: FsdpSettings | None
) -> str | None:
    if args.device.type != "cuda":
        return "CUDA graphs need a GPU"
    if not residency.is_whole:
        return "layers are gathered within the step"
    if _recomputes(args, settings):
        return "activations are recomputed"
    return None


def _recomputes(args: FineTuningArguments, settings: FsdpSettings | None) -> bool:
    """Whether activations are recomputed in backward."""
    return args.gradient_checkpointing or bool(settings and settings.activation_checkpointing)


def _row_length(
    memory: RowMemory, *, device: torch.device, longest_example: int, by_blocks: bool
) -> int:
    """The longest row that memory allows, the same on every rank; a collective call on GPUs."""
    if device.type != "cuda" or not by_blocks:
        return max(USUAL_ROW, longest_example)
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
    return longest_row(memory, free=int(free.item()), longest_example=longest_example)
