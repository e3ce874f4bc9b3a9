"""What a run computes: from the rows themselves, or from numbers given for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import Batch, Pack, Packing, Tree, plan_packs
from lora_fsdp.data.sampling import TrainingStep, TrainingSteps, epoch_order, target_tree
from lora_fsdp.data.schedule import Schedule, examples_per_rank
from lora_fsdp.tasks import Task
from lora_fsdp.tasks.answers.kind import TFIDF

_STEPS_LOOKED_AT = 20
# Tokens of a batch of sequences of one example, where nothing else is asked for.
_USUAL_BATCH = 2048
# For the largest step: longer runs see the same examples over and over.
_EXAMPLES_LOOKED_AT = 2_000_000


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Attributes:
        steps: optimizer steps.
        examples: training examples, all epochs together.
        examples_per_rank: of one optimizer step on one rank.
        step_tokens: tokens that a rank computes in an optimizer step; a prefix that examples share
            counts once a packed sequence.
        step_labels: at how many of them the head runs.
        largest_step: tokens of the largest step on any rank, of those with the first two million
            examples (in any case of the first epoch).
        longest_example: a prompt with its longest answer, in tokens.
        scored_tokens: of held-out rows, before and after training together.
        evaluations: of the held-out rows while training.
        scored_once: tokens that all ranks together compute to score the held-out rows once, as
            sequences lay them.
        probed_tokens: the same of the training rows that the probe reads.
        rows: training and held-out ones, each once.
    """

    steps: int
    examples: float
    examples_per_rank: int
    step_tokens: float
    step_labels: float
    largest_step: int
    longest_example: int
    scored_tokens: float = 0.0
    evaluations: int = 0
    scored_once: float = 0.0
    probed_tokens: float = 0.0
    rows: int = 0

    @property
    def forward_tokens(self) -> float:
        """Tokens of all forwards before and after training, of all ranks together."""
        return 2.0 * self.scored_once + self.probed_tokens


def measure_work(
    training: Mapping[str, Any],
    train: Sequence[EncodedExample],
    held_out: Sequence[EncodedExample],
    *,
    ranks: int,
    share_prefix: bool,
    tree_of: Callable[[EncodedExample], Tree] = target_tree,
    packing: Packing = Packing.PACKED,
    probed: int = 0,
) -> Work:
    """Pack some optimizer steps as training will, and count: the first ones, and the largest.

    `training` holds values of `FineTuningArguments` by name, and `probed` says how many training
    rows the probe reads; the others are as in `TrainingSteps`.
    """
    if not train:
        return replace(NO_WORK, longest_example=max(1, longest_example(held_out)))
    longest = training["max_tokens_per_row"] or _USUAL_BATCH
    schedule = Schedule.of(training, rows=len(train), ranks=ranks)
    seed = training["seed"] if training["data_seed"] is None else training["data_seed"]
    steps = TrainingSteps(
        train,
        examples_per_step=min(schedule.examples_per_step, len(train)),
        rank=0,
        world_size=ranks,
        seed=int(seed),
        share_prefix=share_prefix,
        max_tokens=training["max_tokens_per_row"] or (_USUAL_BATCH if packing.is_apart else 2**31),
        tree_of=tree_of,
        packing=packing,
    )
    looked_at = min(len(steps), max(1, schedule.steps), _STEPS_LOOKED_AT)
    seen = [steps[index] for index in range(looked_at)]
    sizes = [_tokens(step) for step in seen]
    return Work(
        steps=max(1, schedule.steps),
        examples=schedule.examples,
        examples_per_rank=examples_per_rank(training),
        step_tokens=sum(sizes) / len(seen),
        step_labels=sum(one.size.labels for step in seen for one in step.sequences) / len(seen),
        largest_step=max(*sizes, _largest_step(steps, epochs=schedule.epochs)),
        # An objective may train on several answers of an example.
        longest_example=max(
            longest_example([*train, *held_out]),
            *(_tokens_of(tree, packing) for tree in map(tree_of, train)),
        ),
        # Before and after training.
        scored_tokens=2.0 * sum(example.tokens for example in held_out),
        evaluations=schedule.evaluations(training),
        scored_once=_forward_tokens(
            [(one.prompt_ids, one.scored_ids) for one in held_out], longest, packing
        ),
        probed_tokens=_forward_tokens(
            [(one.prompt_ids, [one.target_ids[:1]]) for one in train[:probed]], longest, packing
        ),
        rows=len(train) + len(held_out),
    )


def probed_rows(task: Task, most: int, rows: int) -> int:
    """Training rows that the probe learns from; where a classic regression fits, it does too."""
    return min(most, rows) if TFIDF in task.answer_kind.rivals else 0


def _forward_tokens(
    asked: Sequence[tuple[list[int], Sequence[list[int]]]], longest: int, packing: Packing
) -> float:
    """Tokens of sequences that hold prompts, each with its answers; what all share counts once."""
    if packing.is_apart:
        return float(sum(len(ids) + len(one) for ids, answers in asked for one in answers))
    trees = [Tree(prompt, answers) for prompt, answers in asked]
    packs = plan_packs(trees, max_tokens=longest, share_prefix=True)
    return float(sum(pack.size.tokens for pack in packs))


def _tokens_of(tree: Tree, packing: Packing) -> int:
    """Of an example alone; all its answers are computed at once."""
    return Batch([tree]).size.tokens if packing.is_apart else len(tree)


def _tokens(step: TrainingStep) -> int:
    return sum(map(len, step.sequences))


def _largest_step(steps: TrainingSteps, *, epochs: float) -> int:
    """Tokens of the step that is the largest on any rank, going by the examples' lengths."""
    examples = steps.examples
    trees = [steps.tree_of(example) for example in examples]
    lengths = np.array([_tokens_of(tree, steps.packing) + len(tree.answers) for tree in trees])
    if steps.share_prefix and not steps.packing.is_apart:  # as if a step were one packed sequence
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
                most, found = int(tokens.max()), (epoch, rank, int(tokens.argmax()))
    epoch, rank, index = found
    largest = replace(steps, rank=rank)
    largest.set_epoch(epoch)
    return _tokens(largest[index])


def given_work(
    training: Mapping[str, Any],
    *,
    examples: int,
    tokens_per_example: float,
    label_tokens_per_example: float,
    ranks: int,
) -> Work:
    """The work of examples of which only numbers are known; all are taken to be equally long.

    Args:
        training: values of `FineTuningArguments` by name.
        examples: rows to train on.
        tokens_per_example: of a row with its answer.
        label_tokens_per_example: of its answer.
        ranks: that share a step.
    """
    schedule = Schedule.of(training, rows=examples, ranks=ranks)
    per_rank = examples_per_rank(training)
    return Work(
        steps=max(1, schedule.steps),
        examples=schedule.examples,
        examples_per_rank=per_rank,
        step_tokens=tokens_per_example * per_rank,
        step_labels=label_tokens_per_example * per_rank,
        largest_step=math.ceil(tokens_per_example * per_rank),
        longest_example=math.ceil(tokens_per_example),
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


#: Of a model that is only evaluated.
NO_WORK = Work(
    steps=1,
    examples=0,
    examples_per_rank=1,
    step_tokens=1,
    step_labels=1,
    largest_step=1,
    longest_example=1,
)
