"""Supervised learning: the right answer's tokens, each counting one."""

from __future__ import annotations

import torch

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import PADDING, PackedSequence, Tree
from lora_fsdp.data.sampling import target_tokens, target_tree
from lora_fsdp.training.step.objectives.objective import Objective


class Supervised(Objective):
    """Mean cross-entropy of the label tokens of all examples."""

    def tree(self, example: EncodedExample) -> Tree:
        """The prompt and its target."""
        return target_tree(example)

    def count(self, example: EncodedExample) -> float:
        """Label tokens."""
        return target_tokens(example)

    def loss(
        self, sequence: PackedSequence, log_probs: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor:
        """Minus the sum of the log-probabilities."""
        counted = sequence.label_answers != PADDING
        return -log_probs.where(counted, 0.0).sum()
