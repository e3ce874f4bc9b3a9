"""How likely each answer is: scored in packed sequences, under FSDP, without `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.sampling import ScoringSequence, ScoringSequences
from lora_fsdp.ranks import sum_over_ranks

if TYPE_CHECKING:
    from lora_fsdp.evaluation.probing import MeanStates


@dataclass(frozen=True)
class Scores:
    """Scores of N examples with up to A answers each, on the CPU and the same on every rank.

    Attributes:
        log_likelihoods: [N, A] float32, log-probability of each answer with its end token; minus
            infinity for the answers that an example has fewer than others.
        end_log_likelihoods: [N, A] float32, the part of `log_likelihoods` that is the end token's;
            0 where there is no answer.
    """

    log_likelihoods: torch.Tensor
    end_log_likelihoods: torch.Tensor | None = None

    @property
    def best(self) -> list[int]:
        """[N], the most likely answer of each example."""
        return self.log_likelihoods.argmax(dim=1).tolist()

    @property
    def probabilities(self) -> torch.Tensor:
        """[N, A] float32, softmax over each example's answers."""
        return self.log_likelihoods.softmax(dim=1)


@torch.no_grad()
def score_sequences(
    packed: PackedModel,
    sequences: Iterable[ScoringSequence],
    *,
    answers: Sequence[int],
    device: torch.device,
    after_sequence: Callable[[], None] | None = None,
    states: MeanStates | None = None,
) -> Scores:
    """Score this rank's `sequences` and join the ranks' results.

    A collective call: every rank must bring as many.

    Args:
        packed: the model.
        sequences: this rank's share of the N examples.
        answers: [N] how many answers each example has.
        device: where sequences are computed.
        after_sequence: called after each.
        states: takes the hidden states of each.
    """
    counts = torch.tensor(answers, dtype=torch.int64)
    count, most = len(answers), max(answers, default=0)
    was_training = packed.model.training
    packed.model.eval()
    # One tensor for all results, so that the ranks join them in one all-reduce.
    results = torch.zeros(2, count * most, dtype=torch.float32, device=device)
    for scoring in sequences:
        sequence = scoring.sequence.to(device, non_blocking=True)
        log_probs = packed.label_log_probs(sequence).float()
        places = answer_places(scoring, counts=counts, most=most).to(device)
        owner = places[sequence.label_answers]
        results[0].index_add_(0, owner, log_probs)
        ends = _last_of_each(sequence.label_answers)
        results[1].index_add_(0, owner[ends], log_probs[ends])
        if states is not None:
            states.add(sequence, scoring.examples)
        if after_sequence is not None:
            after_sequence()
    sum_over_ranks(results)
    packed.model.train(was_training)
    likelihoods, ends_of_answers = results.cpu().view(2, count, most)
    absent = torch.arange(most) >= counts[:, None]
    return Scores(likelihoods.masked_fill(absent, -torch.inf), ends_of_answers)


@contextmanager
def base_alone(model: PeftModel) -> Iterator[None]:
    """The model without its adapter, also where that is switched off already.

    PEFT's `disable_adapter` would switch it on at its end.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if all(layer.disable_adapters for layer in layers):
        yield
        return
    with model.disable_adapter():
        yield


def score_examples(
    packed: PackedModel,
    examples: Sequence[EncodedExample],
    *,
    device: torch.device,
    max_tokens: int = 2048,
) -> Scores:
    """Score `examples` with an unsharded model in this process alone."""
    sequences = ScoringSequences(
        examples, rank=0, world_size=1, max_tokens=max_tokens, packing=packed.packing
    )
    return score_sequences(
        packed,
        (sequences[index] for index in range(len(sequences))),
        answers=[len(answers) for answers in sequences.answers],
        device=device,
    )


def _last_of_each(answers: torch.Tensor) -> torch.Tensor:
    """[L] bool, whether a label token is the last of its answer, by which answer each is of."""
    is_last = torch.ones_like(answers, dtype=torch.bool)
    is_last[:-1] = answers[:-1] != answers[1:]
    return is_last


def answer_places(scoring: ScoringSequence, *, counts: torch.Tensor, most: int) -> torch.Tensor:
    """Where a sequence's answers stand in the flat [N * A] result, in its order."""
    chosen = torch.tensor(scoring.examples, dtype=torch.int64)
    if scoring.answers is not None:
        return chosen * most + torch.tensor(scoring.answers, dtype=torch.int64)
    places = chosen[:, None] * most + torch.arange(most)
    return places[torch.arange(most) < counts[chosen][:, None]]
