"""Optimizer steps of several adapters whose parts are computed in one pass of fixed shapes.

Gradients, norms, clipping and updates stay on the device, on a GPU as CUDA graphs. While it
computes, the host lays out the next step; it reads what a step came to when the next one is under
way. So an adapter that stops is known one step later, and has not moved meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.compute.grouped.grouped_pass import GroupedPass
from lora_fsdp.compute.grouped.sequences import StackedSequences, StackedSize, size_of_all
from lora_fsdp.data.packing import PackedSequence
from lora_fsdp.data.sampling import TrainingStep
from lora_fsdp.ranks import sum_over_ranks
from lora_fsdp.training.step.graph_recording import GraphRecorder, Replayed
from lora_fsdp.training.step.objectives.objective import Objective
from lora_fsdp.training.together.members import Member, StepMade
from lora_fsdp.training.together.updates import DeviceUpdates, Outcome, can_update_on_device

# Sizes that are recorded; further ones are launched.
_MOST_GRAPHS = 32


class GroupedStep:
    """Makes steps of all adapters that are live.

    Args:
        grouped: computes their parts.
        objective: what is minimised; needs no reference.
        adapters: parameters and gradients of all.
        device: where.
        captured: whether CUDA graphs are recorded; otherwise the same is launched, as on a CPU.

    Attributes:
        passes: how often the base was run forward and backward so far.
        recorder: of the graphs; `None` = nothing is captured.
        sizes: the sizes of parts that were computed, in their order.
    """

    def __init__(
        self,
        grouped: GroupedPass,
        *,
        objective: Objective,
        adapters: AdapterSet,
        device: torch.device,
        captured: bool,
    ) -> None:
        self.grouped, self.objective, self.adapters = grouped, objective, adapters
        self.device, self.passes = device, 0
        self.sizes: list[StackedSize] = []
        self.recorder = GraphRecorder() if captured else None
        self._live: list[Member] = []
        self._updates: DeviceUpdates | None = None
        self._hand_over: Replayed | None = None
        self._losses = self._scales = torch.empty(0)
        self._waiting: deque[_Waiting] = deque()
        self._passes: dict[StackedSize, _Pass] = {}

    def make_step(self, live: Sequence[Member]) -> bool:
        """One optimizer step of each of `live`; whether any was left to make one."""
        live = list(live)
        if live != self._live:
            self.settle()
            live = [member for member in live if member.is_live]
            if not live:
                return False
            self._begin(live)
        losses = self.gradients([member.share() for member in live])
        self.adapters.sum_gradients()
        sum_over_ranks(losses)
        if self._updates is None:
            norms = torch.stack([member.clip() for member in live])
            for member, loss, norm in zip(live, losses.tolist(), norms.tolist(), strict=True):
                member.update(loss, norm)
            return True
        outcome = self._updates()
        self._waiting.append(_Waiting(live, [member.advance() for member in live], outcome))
        while len(self._waiting) > 1:
            self._take_in(self._waiting.popleft())
        return True

    def settle(self) -> None:
        """Wait for what is under way, and take in what it came to."""
        while self._waiting:
            self._take_in(self._waiting.popleft())

    def release(self) -> None:
        """Let go of the graphs and their memory."""
        self._live, self._updates = [], None
        self._passes.clear()
        self._hand_over = None
        if self.recorder is not None:
            self.recorder.release_memory()

    def gradients(self, shares: Sequence[TrainingStep]) -> torch.Tensor:
        """Gradients of this rank's shares, one for each that is live, into the adapters' block;
        each one's loss, [live].
        """
        self.grouped.zero_gradients()
        self._losses.zero_()
        scales = torch.tensor([1.0 / share.denominator for share in shares])
        on_gpu = self._scales.is_cuda
        self._scales.copy_(scales.pin_memory() if on_gpu else scales, non_blocking=True)
        for turn in range(max(len(share.sequences) for share in shares)):
            sequences = [
                share.sequences[turn] if turn < len(share.sequences) else None for share in shares
            ]
            self._pass_of(sequences)()
            self.passes += 1
        if self._hand_over is not None:
            self._hand_over()
        return self._losses

    def _begin(self, live: list[Member]) -> None:
        """Compute with these from now on."""
        self.release()
        self._live = live
        self.adapters.zero_gradients()
        self.grouped.stack([member.adapter_name for member in live])
        self._losses = torch.zeros(len(live), device=self.device)
        self._scales = torch.zeros(len(live), device=self.device)
        self._hand_over = Replayed(self.grouped.hand_over_gradients, self.recorder)
        if can_update_on_device(live):
            self._updates = DeviceUpdates(live, self._losses, self.recorder)

    def _pass_of(self, sequences: Sequence[PackedSequence | None]) -> _Pass:
        """Which computes sequences of their size; they are where it reads them."""
        size = size_of_all(sequences, with_rows=self.grouped.leaves_padding_out)
        if size not in self._passes:
            recorder = self.recorder if len(self._passes) < _MOST_GRAPHS else None
            static = StackedSequences(len(sequences), size, device=self.device)
            self._passes[size] = _Pass(self, static, recorder)
            self.sizes.append(size)
        self._passes[size].sequences.load(sequences)
        return self._passes[size]

    def compute(self, sequences: StackedSequences) -> None:
        """Add the gradients of these to the stacks, and their losses to `losses`."""
        log_probs = self.grouped.label_log_probs(sequences).view(sequences.count, -1)
        losses = torch.stack(
            [
                self.objective.loss(part, own, None)
                for part, own in zip(sequences.parts, log_probs, strict=True)
            ]
        )
        losses = losses * self._scales
        losses.sum().backward()
        self._losses.add_(losses.detach())

    def _take_in(self, waiting: _Waiting) -> None:
        losses, norms = waiting.outcome.read()
        for member, made, loss, norm in zip(
            waiting.members, waiting.made, losses, norms, strict=True
        ):
            if member.stopped is None and not member.stops(loss, norm, step=made.step):
                member.take_in(loss, norm, made)


class _Waiting(NamedTuple):
    """A step that is under way."""

    members: Sequence[Member]
    made: Sequence[StepMade]
    outcome: Outcome


class _Pass:
    """A pass of one size, and the memory that it reads."""

    def __init__(
        self, step: GroupedStep, sequences: StackedSequences, recorder: GraphRecorder | None
    ) -> None:
        self.sequences = sequences
        self._replayed = Replayed(lambda: step.compute(sequences), recorder)

    def __call__(self) -> None:
        self._replayed()
