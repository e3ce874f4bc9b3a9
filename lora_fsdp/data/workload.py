"""What a run computes: from the rows themselves, or from numbers given for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import Pack, Tree
from lora_fsdp.data.sampling import TrainingStep, TrainingSteps, epoch_order, target_tree

_STEPS_LOOKED_AT = 20
# For the largest step: longer runs see the same examples over and over.
_EXAMPLES_LOOKED_AT = 2_000_000


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Attributes:
        examples: training examples, all epochs together.
        examples_per_rank: of one optimizer step on one rank.
        step_tokens: tokens that a rank computes in an optimizer step; a prefix that examples share
            counts once a row.
        step_labels: at how many of them the head runs.
        largest_step: tokens of the largest step on any rank, of those with the first two million
            examples (in any case of the first epoch).
        longest_example: a prompt with its longest answer, in tokens.
        scored_tokens: of held-out rows, all evaluations together.
        max_tokens_per_row: longest row; `None` = by memory.
    """

    examples: float
    examples_per_rank: int
    step_tokens: float
    step_labels: float
    largest_step: int
    longest_example: int
    scored_tokens: float = 0.0
    max_tokens_per_row: int | None = None

    def steps(self, ranks: int) -> int:
        """Optimizer steps of the run."""
        return max(1, math.ceil(self.examples / (self.examples_per_rank * ranks)))


def measure_work(
    train: Sequence[EncodedExample],
    held_out: Sequence[EncodedExample],
    *,
    examples_per_rank: int,
    epochs: float,
    share_prefix: bool,
    max_tokens_per_row: int | None,
    ranks: int = 1,
    seed: int = 0,
    tree_of: Callable[[EncodedExample], Tree] = target_tree,
) -> Work:
    """Pack some optimizer steps as training will, and count: the first ones, and the largest.

    Args:
        train, held_out: the rows as tokens.
        examples_per_rank: of one optimizer step on one rank.
        epochs: how many times the rows are seen.
        share_prefix: compute the prompts' common prefix once a row.
        max_tokens_per_row: longest row; `None` = by memory.
        ranks: that share a step.
        seed: of the order of the examples.
        tree_of: which answers of a training example are laid down.
    """

    def steps_of(rank: int, *, epoch: int) -> TrainingSteps:
        steps = TrainingSteps(
            train,
            examples_per_step=min(examples_per_rank * ranks, len(train)),
            rank=rank,
            world_size=ranks,
            seed=seed,
            share_prefix=share_prefix,
            max_tokens=max_tokens_per_row or 2**31,
            tree_of=tree_of,
        )
        steps.set_epoch(epoch)
        return steps

    first = steps_of(0, epoch=0)
    looked_at = min(len(first), max(1, math.ceil(epochs * len(first))), _STEPS_LOOKED_AT)
    seen = [first[index] for index in range(looked_at)]
    sizes = [_tokens(step) for step in seen]
    labels = [int(one.labels.shape[1]) for step in seen for one in step.sequences]
    epoch, index, rank = _largest_step(first, epochs=epochs)
    return Work(
        examples=len(train) * epochs,
        examples_per_rank=examples_per_rank,
        step_tokens=sum(sizes) / len(seen),
        step_labels=sum(labels) / len(seen),
        largest_step=max(*sizes, _tokens(steps_of(rank, epoch=epoch)[index])),
        longest_example=longest_example([*train, *held_out]),
        # Before and after training.
        scored_tokens=2.0 * sum(len(e.prompt_ids) + len(e.target_ids) for e in held_out),
        max_tokens_per_row=max_tokens_per_row,
    )


def _tokens(step: TrainingStep) -> int:
    return sum(map(len, step.sequences))


def _largest_step(steps: TrainingSteps, *, epochs: float) -> tuple[int, int, int]:
    """Epoch, place in it and rank of the step with the most tokens, by the examples' lengths."""
    examples = steps.examples
    trees = [steps.tree_of(example) for example in examples]
    lengths = np.array([len(tree) + len(tree.answers) for tree in trees])
    if steps.share_prefix:  # as if a step were one packed sequence
        lengths -= Pack(trees, share_prefix=True).shared
    most, found = -1, (0, 0, 0)
    most_epochs = max(1, _EXAMPLES_LOOKED_AT // len(examples))
    for epoch in range(min(max(1, math.ceil(epochs)), most_epochs)):
        count = len(steps)
        if epochs - epoch < 1:
            count = max(1, math.ceil((epochs - epoch) * count))
        order = epoch_order(len(examples), seed=steps.seed, epoch=epoch)
        shares = np.zeros(len(steps) * steps.examples_per_step, dtype=lengths.dtype)
        shares[: len(examples)] = lengths[order]
        by_step = shares.reshape(len(steps), steps.examples_per_step)[:count]
        for rank in range(steps.world_size):
            tokens = by_step[:, rank :: steps.world_size].sum(axis=1)
            if tokens.max() > most:
                most, found = int(tokens.max()), (epoch, int(tokens.argmax()), rank)
    return found


def given_work(
    *,
    examples: float,
    tokens_per_example: float,
    label_tokens_per_example: float,
    examples_per_rank: int,
    epochs: float,
    max_tokens_per_row: int | None,
) -> Work:
    """The work of examples of which only numbers are known; all are taken to be equally long."""
    return Work(
        examples=examples * epochs,
        examples_per_rank=examples_per_rank,
        step_tokens=tokens_per_example * examples_per_rank,
        step_labels=label_tokens_per_example * examples_per_rank,
        largest_step=math.ceil(tokens_per_example * examples_per_rank),
        longest_example=math.ceil(tokens_per_example),
        max_tokens_per_row=max_tokens_per_row,
    )


def longest_example(examples: Sequence[EncodedExample]) -> int:
    """The longest prompt with its longest answer, in tokens."""
    return max(
        (
            len(example.prompt_ids)
            + max(len(ids) for ids in (example.target_ids, *example.candidate_ids))
            for example in examples
        ),
        default=0,
    )
