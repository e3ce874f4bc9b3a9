"""What a run computes: from the rows themselves, or from numbers given for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import PADDING
from lora_fsdp.data.sampling import TrainingSteps

_STEPS_LOOKED_AT = 20


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Attributes:
        examples: training examples, all epochs together.
        examples_per_rank: of one optimizer step on one rank.
        step_tokens: tokens that a rank computes in an optimizer step; a prefix that examples share
            counts once a row.
        step_labels: at how many of them the head runs.
        largest_step: tokens of the largest step that was looked at.
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
) -> Work:
    """Pack the first optimizer steps as training will, and count.

    Args:
        train, held_out: the rows as tokens.
        examples_per_rank: of one optimizer step on one rank.
        epochs: how many times the rows are seen.
        share_prefix: compute the prompts' common prefix once a row.
        max_tokens_per_row: longest row; `None` = by memory.
    """
    steps = TrainingSteps(
        train,
        examples_per_step=min(examples_per_rank, len(train)),
        rank=0,
        world_size=1,
        seed=0,
        share_prefix=share_prefix,
        max_tokens=max_tokens_per_row or 2**31,
    )
    seen = [steps[index] for index in range(min(len(steps), _STEPS_LOOKED_AT))]
    labels = [int((row.label_answers != PADDING).sum()) for step in seen for row in step.rows]
    sizes = [sum(map(len, step.rows)) for step in seen]
    return Work(
        examples=len(train) * epochs,
        examples_per_rank=examples_per_rank,
        step_tokens=sum(sizes) / len(seen),
        step_labels=sum(labels) / len(seen),
        largest_step=max(sizes),
        longest_example=longest_example([*train, *held_out]),
        # Before and after training.
        scored_tokens=2.0 * sum(len(e.prompt_ids) + len(e.target_ids) for e in held_out),
        max_tokens_per_row=max_tokens_per_row,
    )


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
