"""What is minimised: a kind of loss is one file beside this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import PADDING, PackedSequence, Tree


class Objective(ABC):
    """A loss over examples: the sum of their losses over the sum of what they count.

    Sum and count are global, over an optimizer step's packed sequences and ranks, so neither the
    number of ranks nor accumulation weighs an example otherwise.
    """

    #: Whether `loss` gets the frozen base's log-probabilities, at the price of a second forward.
    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def tree(self, example: EncodedExample) -> Tree:
        """Which answers are laid into the packed sequence, with a target for each.

        Each answer has a token at least; the end token stands at its end.
        """

    @abstractmethod
    def count(self, example: EncodedExample) -> float:
        """What the example counts in the denominator; all of a step together more than 0."""

    @abstractmethod
    def loss(
        self,
        sequence: PackedSequence,
        log_probs: torch.Tensor,
        reference: torch.Tensor | None,
    ) -> torch.Tensor:
        """The sum of the losses of a packed sequence's examples, a scalar, in nats.

        Runs within a CUDA graph: no result may be brought to the CPU, no shape may depend on a
        number. Padding (`PADDING` in `label_answers` and `answer_examples`) must count nothing.

        Args:
            sequence: the L label tokens and A answers that were computed.
            log_probs: [L], log-probability of each label token.
            reference: [L], the frozen base's; given if `needs_reference`.
        """


def sum_over_answers(sequence: PackedSequence, log_probs: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of each answer, [A]; 0 for padding.

    Args:
        sequence: L label tokens and A answers, on `log_probs`' device.
        log_probs: [L].
    """
    owners = sequence.label_answers
    sums = log_probs.new_zeros(len(sequence.answer_examples))
    return sums.index_add(0, owners.clamp(min=0), log_probs.where(owners != PADDING, 0.0))


def sum_over_examples(sequence: PackedSequence, values: torch.Tensor) -> torch.Tensor:
    """The sum over each example's answers, [A]: as many places as answers, the last ones unused.

    Args:
        sequence: A answers.
        values: [A], one for each answer; what it says of padding is left out.
    """
    owners = sequence.answer_examples
    sums = torch.zeros_like(values)
    return sums.index_add(0, owners.clamp(min=0), values.where(owners != PADDING, 0.0))
