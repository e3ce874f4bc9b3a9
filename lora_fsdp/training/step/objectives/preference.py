"""Direct preference optimisation: the better of two answers gains on the worse one."""

from __future__ import annotations

import torch
from torch.nn import functional

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import PackedSequence, Tree
from lora_fsdp.training.step.objectives.objective import (
    Objective,
    sum_over_answers,
    sum_over_examples,
)


class Preference(Objective):
    """Weighted mean of `-log sigmoid(beta * margin)` over all examples.

    An answer's gain is its log-likelihood less that of the frozen base, the adapter switched off in
    the same step; the margin is the gain of the target less that of the other answer. Prompt and
    both answers are one tree, so the prompt is computed once. Source: Rafailov et al., "Direct
    Preference Optimization" (arXiv 2305.18290), as `trl.DPOTrainer` has it (`loss_type="sigmoid"`).

    Args:
        smoothing: how likely it is taken to be that the two answers are the wrong way round
            (`label_smoothing` of TRL; Mitchell, "A note on DPO with noisy preferences", 2023).
        beta: how much the margin counts; the smaller, the further from the base.
    """

    needs_reference = True

    def __init__(self, smoothing: float = 0.0, *, beta: float) -> None:
        self.smoothing = smoothing
        self.beta = beta

    def tree(self, example: EncodedExample) -> Tree:
        """The prompt with the target and the other answer; their sign tells them apart."""
        weight = example.example.weight
        better = example.candidate_ids[example.label or 0]
        [worse] = [ids for ids in example.candidate_ids if ids is not better]
        return Tree(example.prompt_ids, [better, worse], [weight, -weight])

    def count(self, example: EncodedExample) -> float:
        """Its weight: pairs count, not tokens."""
        return example.example.weight

    def loss(
        self, sequence: PackedSequence, log_probs: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor:
        """The weighted sum over the pairs."""
        if reference is None:
            raise ValueError("Preference needs the log-probabilities of the frozen base.")
        signed = sequence.answer_targets
        gains = sum_over_answers(sequence, log_probs - reference)
        margins = self.beta * sum_over_examples(sequence, signed.sign() * gains)
        weights = sum_over_examples(sequence, signed.abs()) / 2  # 0 for padding
        losses = -(1 - self.smoothing) * functional.logsigmoid(margins)
        losses = losses - self.smoothing * functional.logsigmoid(-margins)
        return (weights * losses).sum()
