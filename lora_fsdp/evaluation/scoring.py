"""How likely each answer is: label likelihoods in packed rows, under FSDP, without `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_fsdp.compute.label_head import RowComputation, label_outputs
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.sampling import ScoringSequence, ScoringSequences
from lora_fsdp.ranks import sum_over_ranks


@dataclass(frozen=True)
class Scores:
    """Scores of N examples with up to A answers each, on the CPU and the same on every rank.

    Attributes:
        log_likelihoods: [N, A] float32, log-probability of each answer with its end token; minus
            infinity for the answers that an example has fewer than others.
        is_greedy: [N, A] bool, whether greedy decoding from the prompt writes exactly this answer
            (each of its tokens is the most likely one given those before it).
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
    model: nn.Module,
    rows: Iterable[ScoringSequence],
    *,
    answers: Sequence[int],
    device: torch.device,
    computation: RowComputation,
    after_row: Callable[[], None] | None = None,
) -> Scores:
    """Score this rank's `rows` and join the ranks' results.

    A collective call: every rank must bring the same number of rows.

    Args:
        rows: this rank's share of the N examples.
        answers: [N] how many answers each example has.
    """
    counts = torch.tensor(answers, dtype=torch.int64)
    count, most = len(answers), max(answers, default=0)
    was_training = model.training
    model.eval()
    # One tensor for both results, so that the ranks join them in one all-reduce.
    results = torch.zeros(2, count * most, dtype=torch.float32, device=device)
    for scoring in rows:
        row = scoring.row.to(device, non_blocking=True)
        outputs = label_outputs(model, row, computation=computation)
        places = _answer_places(scoring.examples, counts=counts, most=most).to(device)
        owner = places[row.label_answers]
        results[0].index_add_(0, owner, outputs.log_probs.float())
        results[1].index_add_(0, owner, (~outputs.is_most_likely).float())
        if after_row is not None:
            after_row()
    sum_over_ranks(results)
    model.train(was_training)
    likelihoods, misses = results.cpu().view(2, count, most)
    absent = torch.arange(most) >= counts[:, None]
    return Scores(likelihoods.masked_fill(absent, -torch.inf), (misses == 0) & ~absent)


def score_examples(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    *,
    device: torch.device,
    computation: RowComputation,
    max_tokens: int = 2048,
) -> Scores:
    """Score `examples` with an unsharded model in this process alone."""
    rows = ScoringSequences(examples, rank=0, world_size=1, max_tokens=max_tokens)
    return score_sequences(
        model,
        (rows[index] for index in range(len(rows))),
        answers=[len(answers) for answers in rows.answers],
        device=device,
        computation=computation,
    )


def _answer_places(examples: Sequence[int], *, counts: torch.Tensor, most: int) -> torch.Tensor:
    """Where a row's answers stand in the flat [N * A] result, in the row's order."""
    chosen = torch.tensor(examples, dtype=torch.int64)
    places = chosen[:, None] * most + torch.arange(most)
    return places[torch.arange(most) < counts[chosen][:, None]]
