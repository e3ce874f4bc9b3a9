"""Focal loss: what the model is sure of already counts less."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_fsdp.data.packing import PADDING, PackedSequence
from lora_fsdp.training.step.objectives.objective import sum_over_answers
from lora_fsdp.training.step.objectives.supervised import Supervised

# Of 1 - p: below it a power's slope has no bound.
_LEAST = 1e-6


class Focal(Supervised):
    """Weighted mean of `-(1 - p)^gamma log p`, p the likelihood of a whole right answer.

    With gamma 0 it is `Supervised`, and what an answer counts is as there: its tokens, times the
    example's weight. Source: Lin et al., "Focal Loss for Dense Object Detection" (2017), whose p is
    that of the right class.

    Args:
        gamma: how much less a likely answer counts; more than 0.
        questions: as for `Supervised`.
    """

    def __init__(self, gamma: float, *, questions: Sequence[int] = ()) -> None:
        super().__init__(questions=questions)
        self.gamma = gamma

    def loss(
        self, sequence: PackedSequence, log_probs: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor:
        """The weighted sum over the answers."""
        scores = sum_over_answers(sequence, log_probs)
        unsure = (-torch.expm1(scores)).clamp(min=_LEAST) ** self.gamma
        losses = -sequence.answer_targets * unsure * scores
        return losses.where(sequence.answer_examples != PADDING, 0.0).sum()
