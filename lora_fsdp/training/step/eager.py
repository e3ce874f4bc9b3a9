"""Forward and backward of one optimizer step's packed sequences, launched kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass

import torch

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import PackedSequence, SequenceSize
from lora_fsdp.training.step.objectives.objective import Objective


@dataclass(eq=False)
class EagerStep:
    """Computes packed sequences as they are.

    Attributes:
        packed: the model with its adapter.
        objective: what is minimised.
        adapter: where the gradients go.
        device: where sequences are computed.
        autocast: the context of the forward.
    """

    packed: PackedModel
    _: KW_ONLY
    objective: Objective
    adapter: AdapterSet
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]

    def __call__(
        self,
        sequences: Sequence[PackedSequence],
        *,
        denominator: float,
        sizes_of_ranks: Sequence[Sequence[SequenceSize]] | None = None,
    ) -> torch.Tensor:
        """Gradients of the sequences' loss, divided by `denominator`, into the adapter's block.

        Args:
            sequences: this rank's; as many on every rank where the base is sharded.
            denominator: of the step, over all ranks.
            sizes_of_ranks: for each of `sequences`, the size that its like has on every rank;
                `None` = there is one rank.

        Returns:
            this rank's part of the loss.
        """
        self.adapter.zero_gradients()
        total = torch.zeros((), device=self.device)
        sizes_of_ranks = sizes_of_ranks or [[sequence.size] for sequence in sequences]
        for sequence, sizes in zip(sequences, sizes_of_ranks, strict=True):
            total += self.run(sequence, denominator=denominator, sizes_of_ranks=sizes)
        return total

    def run(
        self,
        sequence: PackedSequence,
        *,
        denominator: float,
        sizes_of_ranks: Sequence[SequenceSize],
    ) -> torch.Tensor:
        """Add one sequence's gradients; its part of the loss."""
        return self._forward_backward(
            sequence.to(self.device, non_blocking=True), scale=1.0 / denominator
        )

    def release(self) -> None:
        """Let go of what the next sequences would make anew."""

    def _forward_backward(
        self, sequence: PackedSequence, *, scale: float | torch.Tensor
    ) -> torch.Tensor:
        reference: torch.Tensor | None = None
        with self.autocast():
            if self.objective.needs_reference:
                reference = self.packed.reference_log_probs(sequence)
            log_probs = self.packed.label_log_probs(sequence)
        loss = self.objective.loss(sequence, log_probs, reference) * scale
        loss.backward()
        return loss.detach()
