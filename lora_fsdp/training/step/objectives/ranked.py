"""Ranked probability loss: of scores on a scale, a level far off costs more than one next to it."""

from __future__ import annotations

import torch

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import PADDING, PackedSequence, Tree
from lora_fsdp.training.step.objectives.objective import sum_over_answers
from lora_fsdp.training.step.objectives.supervised import Supervised


class Ranked(Supervised):
    """Cross-entropy of the right level, and `weight` times the ranked probability score.

    The score is the squared distance between the cumulative probabilities of the levels and the
    step at the right one, summed over the levels (Epstein, 1969), as the metric of that name; the
    probabilities are those of an example's levels against each other. All levels are laid as
    answers. Both parts count as much as the right answer's tokens do in `Supervised`, so that the
    scores are a mean over rows where all levels have as many tokens.

    Args:
        weight: of the score beside the cross-entropy; more than 0.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def tree(self, example: EncodedExample) -> Tree:
        """The prompt with every level; the sign of a target says which one is right."""
        counts = example.example.weight
        right = [place == example.label for place in range(len(example.candidate_ids))]
        return Tree(
            example.prompt_ids,
            example.candidate_ids,
            [counts if is_right else -counts for is_right in right],
        )

    def loss(
        self, sequence: PackedSequence, log_probs: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor:
        """The weighted sum over the examples."""
        owners, targets = sequence.answer_examples, sequence.answer_targets
        scores = sum_over_answers(sequence, log_probs)
        tokens = sum_over_answers(sequence, torch.ones_like(log_probs))
        same = owners[:, None] == owners[None]  # padding is one example, which counts nothing
        totals = scores[None].masked_fill(~same, -torch.inf).logsumexp(dim=1)
        probabilities = (scores - totals).exp()
        right = (targets > 0).to(scores.dtype)
        upwards = same.tril().to(scores.dtype)  # levels up to each, in their order
        distances = (upwards @ (probabilities - right)).square()
        # What the right answer's tokens count, at each of its example's levels.
        counts = (same.to(scores.dtype) @ (right * tokens)) * targets.abs()
        losses = self.weight * counts * distances - targets * right * scores
        return losses.where(owners != PADDING, 0.0).sum()
