"""Supervised learning: the right answer's tokens, each counting as much as its answer is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import PADDING, PackedSequence, Tree
from lora_fsdp.training.step.objectives.objective import Objective


class Supervised(Objective):
    """Weighted mean cross-entropy of the label tokens of all examples.

    A token of an answer counts its example's weight times the answer's share: 1 for the target and
    0 for the rest, or what `EncodedExample.shares` says. The mean is over all of a step together:
    the sum of what tokens count times their loss, by the sum of what they count.

    Args:
        smoothing: the part of every share that is divided evenly among an example's candidates, as
            in Szegedy et al., "Rethinking the Inception Architecture" (2016): with K candidates
            the target's share is `1 - smoothing + smoothing / K`, and each other one's
            `smoothing / K`.
        questions: how many candidates are the answers to each question, in their order, where a row
            is asked several; each is smoothed by itself, and one without an answer not at all.
    """

    def __init__(self, smoothing: float = 0.0, *, questions: Sequence[int] = ()) -> None:
        self.smoothing = smoothing
        self.questions = questions

    def tree(self, example: EncodedExample) -> Tree:
        """The prompt, and every answer that counts."""
        answers, given, shares = self._learnt(example)
        weights = [example.example.weight * share for share in shares]
        return Tree(example.prompt_ids, answers, weights, given)

    def count(self, example: EncodedExample) -> float:
        """What its label tokens count together."""
        answers, given, shares = self._learnt(example)
        lengths = [len(ids) - before for ids, before in zip(answers, given, strict=True)]
        counted = sum(share * length for share, length in zip(shares, lengths, strict=True))
        return example.example.weight * counted

    def loss(
        self, sequence: PackedSequence, log_probs: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor:
        """Minus the weighted sum of the log-probabilities."""
        owners = sequence.label_answers
        weights = sequence.answer_targets[owners.clamp(min=0)]
        return -(log_probs * weights).where(owners != PADDING, 0.0).sum()

    def _learnt(
        self, example: EncodedExample
    ) -> tuple[Sequence[list[int]], Sequence[int], Sequence[float]]:
        """The answers that count, how many of their tokens are given, and their shares."""
        candidates = example.candidate_ids
        if not candidates or not (self.smoothing or example.shares):
            return [example.target_ids], [0], [1.0]
        shares: Sequence[float] = example.shares
        if not shares:
            shares = [float(place == example.label) for place in range(len(candidates))]
        shares = self._smoothed(shares)
        given = example.given or [0] * len(candidates)
        chosen = [line for line in zip(candidates, given, shares, strict=True) if line[2] > 0]
        answers, tokens, counted = zip(*chosen, strict=True)
        return answers, tokens, counted

    def _smoothed(self, shares: Sequence[float]) -> Sequence[float]:
        if not self.smoothing:
            return shares
        smoothed: list[float] = []
        for size in self.questions or (len(shares),):
            own = shares[len(smoothed) : len(smoothed) + size]
            evenly = self.smoothing * sum(own) / size
            smoothed += [(1 - self.smoothing) * share + evenly for share in own]
        return smoothed
