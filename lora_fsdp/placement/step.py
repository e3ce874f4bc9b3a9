"""Which step a run takes: the model's own layers, fused or compiled ones, and CUDA graphs of them.

All give the same gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.layout import Layout
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.shape import ModelShape

#: Seconds of training from which on compiling the layers (10 s to over a minute) is worth it.
_COMPILATION_PAYS_FROM = 300.0
_GATHERED = "layers are gathered within the step"


class Step(StrEnum):
    """What computes forward and backward, as `--step` calls it."""

    EAGER = "eager"
    FUSED = "fused"
    COMPILED = "compiled"
    GRAPH = "graph"

    @property
    def is_captured(self) -> bool:
        """Whether it is CUDA graphs."""
        return self in (Step.GRAPH, Step.COMPILED)


@dataclass(frozen=True)
class StepChoice:
    """A step, and why in words."""

    step: Step
    reason: str


def check_step_can_be(shape: ModelShape, request: Request) -> None:
    """Refuse fused layers where there can be none.

    Raises:
        ArgumentError: says why.
    """
    if request.step == Step.FUSED and not shape.is_fused:
        raise ArgumentError(f"--step fused: {shape.why_not_fused}. Use --step auto.")


def why_not_captured(
    shape: ModelShape, hardware: Hardware, request: Request, *, recomputed: bool
) -> str | None:
    """Why no CUDA graph holds a rank's own part of a step; `None` = one does.

    What gathering layers adds to that is asked of `why_gathers_not_captured`.
    """
    if not hardware.has_gpu:
        return "CUDA graphs need a GPU"
    if request.step in (Step.EAGER, Step.FUSED):
        return f"--step {request.step}"
    if request.packing_choice.packing.is_apart:
        return "sequences of one example differ in number and length"
    if shape.is_recurrent:
        return "recurrent states follow each sequence's own tree"
    if not recomputed:
        return None
    if request.fsdp is not None and request.fsdp.activation_offload:
        return "what activations are recomputed from waits in host memory"
    if request.own_checkpointing:
        return "activations are recomputed as gradient_checkpointing_kwargs say"
    # What recomputes in a graph must draw no random numbers, nor keep their state.
    if not shape.is_fused:
        return "activations are recomputed by the model's own layers"
    if shape.drops:
        return "activations are recomputed, with dropout as it was drawn"
    return None


def why_gathers_not_captured(hardware: Hardware, request: Request) -> str | None:
    """Why no CUDA graph holds a step in which layers are gathered; `None` = one does."""
    if not hardware.has_gpu or request.step not in ("auto", Step.GRAPH):
        return _GATHERED
    if request.fsdp is not None and request.fsdp.offload:
        return "layers are fetched from host memory within the step"
    return hardware.why_gathers_not_captured


def choose_step(
    shape: ModelShape, layout: Layout, hardware: Hardware, request: Request, *, seconds: float
) -> StepChoice:
    """The step, and why it was chosen; training will take `seconds`, roughly.

    Raises:
        ArgumentError: the step that was asked for cannot be.
    """
    if request.step in (Step.EAGER, Step.FUSED):
        return StepChoice(Step(request.step), f"--step {request.step}")
    uncaptured = why_not_captured(shape, hardware, request, recomputed=layout.recomputed)
    if uncaptured is None and layout.gathers(shape.layers):
        uncaptured = why_gathers_not_captured(hardware, request)
    if uncaptured is not None:
        if request.step != "auto":
            raise ArgumentError(f"--step {request.step}: {uncaptured}. Use --step auto.")
        if shape.is_fused:
            return StepChoice(Step.FUSED, f"fused layers; {uncaptured}")
        return StepChoice(
            Step.EAGER, f"the model's own layers ({shape.why_not_fused}); {uncaptured}"
        )
    if request.step != "auto":
        return StepChoice(Step(request.step), f"--step {request.step}")
    if shape.is_fused:
        return StepChoice(Step.GRAPH, "fused layers, captured as CUDA graphs")
    if seconds > _COMPILATION_PAYS_FROM and not layout.gathers(shape.layers):
        return StepChoice(
            Step.COMPILED,
            f"a run of some {seconds / 60:.0f} minutes pays for compilation "
            f"({shape.why_not_fused})",
        )
    return StepChoice(
        Step.GRAPH, f"the model's own layers ({shape.why_not_fused}), captured as CUDA graphs"
    )
