"""How likely each answer is: scored in packed sequences, under FSDP, without `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.sampling import ScoringSequence, ScoringSequences
from lora_fsdp.ranks import sum_over_ranks


@dataclass(frozen=True)
class Scores:
    """Scores of N examples with up to A answers each, on the CPU and the same on every rank.

    Attributes:
        log_likelihoods: [N, A] float32, log-probability of each answer with its end token; minus
            infinity for the answers that an example has fewer than others.
        is_greedy: [N, A] bool, whether greedy decoding from the prompt generates exactly this
            answer (each of its tokens is the most likely one given those before it).
    """

    log_likelihoods: torch.Tensor
    is_greedy: torch.Tensor

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
) -> Scores:
    """Score this rank's `sequences` and join the ranks' results.

    A collective call: every rank must bring as many.

    Args:
        packed: the model.
        sequences: this rank's share of the N examples.
        answers: [N] how many answers each example has.
        device: where sequences are computed.
        after_sequence: called after each.
    """
    counts = torch.tensor(answers, dtype=torch.int64)
    count, most = len(answers), max(answers, default=0)
    was_training = packed.model.training
    packed.model.eval()
    # One tensor for both results, so that the ranks join them in one all-reduce.
    results = torch.zeros(2, count * most, dtype=torch.float32, device=device)
    for scoring in sequences:
        sequence = scoring.sequence.to(device, non_blocking=True)
        outputs = packed.label_outputs(sequence)
        places = answer_places(scoring.examples, counts=counts, most=most).to(device)
        owner = places[sequence.label_answers]
        results[0].index_add_(0, owner, outputs.log_probs.float())
        results[1].index_add_(0, owner, (~outputs.is_most_likely).float())
        if after_sequence is not None:
            after_sequence()
    sum_over_ranks(results)
    packed.model.train(was_training)
    likelihoods, misses = results.cpu().view(2, count, most)
    absent = torch.arange(most) >= counts[:, None]
    return Scores(likelihoods.masked_fill(absent, -torch.inf), (misses == 0) & ~absent)


def score_examples(
    packed: PackedModel,
    examples: Sequence[EncodedExample],
    *,
    device: torch.device,
    max_tokens: int = 2048,
) -> Scores:
    """Score `examples` with an unsharded model in this process alone."""
    sequences = ScoringSequences(examples, rank=0, world_size=1, max_tokens=max_tokens)
    return score_sequences(
        packed,
        (sequences[index] for index in range(len(sequences))),
        answers=[len(answers) for answers in sequences.answers],
        device=device,
    )


def answer_places(examples: Sequence[int], *, counts: torch.Tensor, most: int) -> torch.Tensor:
    """Where a sequence's answers stand in the flat [N * A] result, in its order."""
    chosen = torch.tensor(examples, dtype=torch.int64)
    places = chosen[:, None] * most + torch.arange(most)
    return places[torch.arange(most) < counts[chosen][:, None]]
