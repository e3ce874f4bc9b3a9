"""`decide`: how a run computes, chosen once. The run, the plan and the doctor ask it alike.

Everything here is a choice between ways that give the same gradients. Nothing here needs CUDA, a
process group or a model: a run asks before it reads a weight, a plan for GPUs that nobody has
rented yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_fsdp.data.packing import Packing
from lora_fsdp.data.workload import Work
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.layout import Layout
from lora_fsdp.placement.memory import DeviceMemory, LargestSequence, device_memory, peak_allocated
from lora_fsdp.placement.packing import PackingChoice
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.residency import (
    Residency,
    asked_layers,
    check_replicas,
    choose_residency,
    with_head_placed,
)
from lora_fsdp.placement.sequences import largest_sequence, sequence_length, usual_length
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.placement.step import (
    Step,
    StepChoice,
    check_step_can_be,
    choose_step,
    why_gathers_not_captured,
    why_not_captured,
)

# Of a rough guess at what training takes: a third of what an H100 can do.
_OPERATIONS_PER_SECOND = 3e14


@dataclass(frozen=True)
class Placement:
    """What was chosen, with the reasons in words.

    Attributes:
        shape: the model's sizes.
        layout: how the base lies across ranks.
        residency: how many layers every rank keeps, and why.
        choice: the step, and why.
        packing: whether examples share sequences.
        shares_prefix: whether sequences compute their prompts' common prefix once.
        sequence_length: longest packed sequence in tokens.
        largest: the largest sequence of a step.
        recomputing: why activations are recomputed though nobody asked for it; empty if not.
        free: bytes that torch's allocator can have; `None` = no memory is planned with.
    """

    shape: ModelShape
    layout: Layout
    residency: Residency
    choice: StepChoice
    packing: PackingChoice
    shares_prefix: bool
    sequence_length: int
    largest: LargestSequence
    recomputing: str
    free: int | None

    @property
    def step(self) -> Step:
        """The step."""
        return self.choice.step

    @property
    def is_whole(self) -> bool:
        """Whether every rank keeps the whole base, so that nothing is sharded."""
        return not self.layout.gathers(self.shape.layers)

    @property
    def memory(self) -> DeviceMemory:
        """Bytes at the peak of a step, part by part."""
        return device_memory(self.shape, self.layout, self.largest)

    @property
    def peak_memory(self) -> int:
        """The bytes that torch will name as its peak on each GPU."""
        return peak_allocated(self.shape, self.layout, self.largest)

    @property
    def largest_tokens(self) -> int:
        """Tokens of the largest sequence, of training or of scoring."""
        return max(self.largest.tokens, self.largest.scored)

    @property
    def fits(self) -> bool:
        """Whether a step's peak fits the memory that is known."""
        return self.free is None or self.memory.allocated <= self.free

    def __str__(self) -> str:
        lines = [
            f"  base      {self._base_in_words()}",
            f"  step      {self.step}: {self.choice.reason}",
            f"  packing   {self._packing_in_words()}",
        ]
        if self.recomputing:
            lines.append(f"  backward  recomputes activations: {self.recomputing}")
        if self.free is not None:
            lines.append(f"  memory    {self.peak_memory / 1e9:.1f} GB at the peak, predicted")
            if not self.is_whole:
                whole = replace(self.layout, resident_layers=self.shape.layers, offloaded=False)
                needed = device_memory(self.shape, whole, self.largest).total / 1e9
                lines.append(
                    f"  faster    on GPUs of {needed:.0f} GB, where every rank keeps the whole base"
                )
        return "\n".join(lines)

    def _packing_in_words(self) -> str:
        if self.packing.packing is Packing.SINGLE:
            return str(self.packing)
        length = f"up to {self.sequence_length} tokens"
        if self.packing.packing is Packing.BATCHED:
            return f"{self.packing}, {length} a batch"
        return f"{length} a sequence"

    def _base_in_words(self) -> str:
        kept, total, reason = self.layout.resident_layers, self.shape.layers, self.residency.reason
        if self.is_whole:
            return f"every rank keeps the whole base ({reason})"
        head = "; the output head stays" if self.layout.whole_head else ""
        if not kept:
            return f"layers are gathered when they are needed{head} ({reason})"
        return f"every rank keeps {kept} of {total} layers{head} ({reason})"


def decide(shape: ModelShape, work: Work, hardware: Hardware, request: Request) -> Placement:
    """How a run computes.

    The shape is counted with the layers that will compute (`Request.why_not_fused`).

    Raises:
        ArgumentError: what was asked for cannot be.
    """
    found = _decide(shape, work, hardware, request)
    if found.fits or found.is_whole or request.step != "auto" or not found.step.is_captured:
        return found
    # Graphs keep buffers of their own; without them a run takes the least memory.
    launched = replace(hardware, why_gathers_not_captured="a graph with gathers does not fit")
    return _decide(shape, work, launched, request)


def _decide(shape: ModelShape, work: Work, hardware: Hardware, request: Request) -> Placement:
    check_step_can_be(shape, request)
    check_replicas(hardware, request)
    layout = _least_layout(shape, hardware, request)
    shortest = largest_sequence(work, max(work.longest_example, request.max_tokens_per_row or 0))
    recomputing = _why_recompute(shape, layout, hardware, largest=shortest)
    if recomputing:
        captured = why_not_captured(shape, hardware, request, recomputed=True) is None
        layout = replace(layout, recomputed=True, captured=captured)
    usual = largest_sequence(work, usual_length(work, request))
    residency = choose_residency(shape, layout, hardware, request, largest=usual)
    layout = replace(layout, resident_layers=residency.layers)
    if hardware.free is not None:
        layout = with_head_placed(shape, layout, usual)
    # 2 operations a weight and token in forward and 2 in backward.
    seconds = 4.0 * shape.parameters * work.step_tokens * work.steps / _OPERATIONS_PER_SECOND
    length = sequence_length(shape, layout, work, hardware, request)
    return Placement(
        shape=shape,
        layout=layout,
        residency=residency,
        choice=choose_step(shape, layout, hardware, request, seconds=seconds),
        packing=request.packing_choice,
        shares_prefix=request.shares_prefix,
        sequence_length=length,
        largest=largest_sequence(work, length),
        recomputing=recomputing,
        free=hardware.free,
    )


def with_packing(
    placement: Placement,
    choice: PackingChoice,
    shape: ModelShape,
    work: Work,
    hardware: Hardware,
    request: Request,
) -> Placement:
    """A placement whose base lies already, with examples that turned out to need other sequences.

    Args:
        placement: of before.
        choice: how examples are laid now: not packed.
        shape, work, request: counted and asked for with that.
        hardware: measured before.
    """
    layout = replace(placement.layout, captured=False, gathers_captured=False)
    length = sequence_length(shape, layout, work, hardware, request)
    return replace(
        placement,
        shape=shape,
        layout=layout,
        choice=choose_step(shape, layout, hardware, request, seconds=0.0),
        packing=choice,
        shares_prefix=False,
        sequence_length=length,
        largest=largest_sequence(work, length),
    )


def least_layout(shape: ModelShape, hardware: Hardware, request: Request) -> Layout:
    """How the base lies where as few layers are resident as the request allows, activations are
    recomputed and no step is captured: where a run takes the least memory.
    """
    layout = _least_layout(shape, hardware, request)
    return replace(layout, recomputed=True, captured=False, gathers_captured=False)


def _least_layout(shape: ModelShape, hardware: Hardware, request: Request) -> Layout:
    fsdp, recomputed = request.fsdp, request.recomputes
    captured = why_not_captured(shape, hardware, request, recomputed=recomputed) is None
    return Layout(
        ranks=hardware.ranks,
        resident_layers=asked_layers(shape.layers, request) or 0,
        kept_until_backward=fsdp is not None and not fsdp.reshard_after_forward,
        one_group=fsdp is not None and not fsdp.wrap_layers,
        offloaded=fsdp is not None and fsdp.offload,
        quantized=request.quantized,
        recomputed=recomputed,
        captured=captured,
        gathers_captured=why_gathers_not_captured(hardware, request) is None,
        hosts=hardware.hosts,
        replicas=1 if fsdp is None else fsdp.replicas,
    )


def _why_recompute(
    shape: ModelShape, least: Layout, hardware: Hardware, *, largest: LargestSequence
) -> str:
    """Why activations must be recomputed; empty if they need not, or are anyway.

    Not before nothing else fits: recomputing costs half of a step's matmuls once more, which is
    more than gathering layers does. In `least` as few layers are resident as can be, and `largest`
    is as short as sequences can be limited to.
    """
    if hardware.free is None or least.recomputed:
        return ""
    placed = with_head_placed(shape, least, largest)
    needed = device_memory(shape, placed, largest).allocated
    if needed <= hardware.free:
        return ""
    return (
        f"with a sequence of {largest.tokens} tokens a step would need {needed / 1e9:.1f} GB, and "
        f"{hardware.free / 1e9:.1f} GB are free"
    )
