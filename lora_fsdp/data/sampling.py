"""Which examples each rank sees at each optimizer step: a function of the seed, epoch and step.

The order of examples does not depend on the number of ranks, and every example comes exactly once
an epoch. So a run is defined by (seed, global batch size), and resuming needs only the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import cast

import numpy as np
from torch.utils.data import Dataset

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import (
    EMPTY,
    Batch,
    Pack,
    PackedSequence,
    Packing,
    SequenceSize,
    Tree,
    empty_sequence,
    plan_batches,
    plan_packs,
)


def target_tree(example: EncodedExample) -> Tree:
    """The prompt and its one right answer, as supervised learning trains on them."""
    return Tree(example.prompt_ids, [example.target_ids])


def target_tokens(example: EncodedExample) -> float:
    """An example's weight where every label token has weight one."""
    return len(example.target_ids)


@dataclass
class TrainingStep:
    """One rank's share of one optimizer step.

    Attributes:
        sequences: the packed sequences; as many on every rank.
        denominator: of the loss, over all ranks: for supervised learning the number of label tokens
            of the step.
        example_rows: row numbers of this rank's examples, for messages.
        sizes_of_ranks: for each of `sequences`, the size that its like has on every rank.
    """

    sequences: list[PackedSequence]
    denominator: float
    example_rows: list[int]
    sizes_of_ranks: list[list[SequenceSize]]

    def pin_memory(self) -> TrainingStep:
        """The same step in page-locked memory."""
        return replace(self, sequences=[sequence.pin_memory() for sequence in self.sequences])


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """The order in which `count` examples are seen in `epoch`."""
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def shares_of_step(
    examples: Sequence[EncodedExample],
    step: int,
    *,
    examples_per_step: int,
    world_size: int,
    seed: int,
) -> list[list[EncodedExample]]:
    """Every rank's examples of an optimizer step, counted from 0 at the run's beginning."""
    epoch, place = divmod(step, -(-len(examples) // examples_per_step))
    order = epoch_order(len(examples), seed=seed, epoch=epoch)
    chosen = order[place * examples_per_step : (place + 1) * examples_per_step]
    return [[examples[i] for i in chosen[rank::world_size]] for rank in range(world_size)]


@dataclass(eq=False)
class TrainingSteps(Dataset[TrainingStep]):
    """The optimizer steps of an epoch, as a map-style dataset: index = step within the epoch.

    Every rank holds all examples and works out every rank's share, so the number of sequences and
    the loss's denominator are known everywhere without communication.

    Attributes:
        examples: all training examples, the same on every rank.
        examples_per_step: examples of one optimizer step over all ranks.
        rank, world_size: this process and the number of processes.
        seed: seed of the order.
        share_prefix: compute the prompts' common prefix once a packed sequence.
        max_tokens: longest packed sequence in tokens.
        tree_of: which answers of an example are trained on (`Objective.tree`).
        count_of: an example's weight in the denominator (`Objective.count`).
        packing: whether examples share sequences.
    """

    examples: Sequence[EncodedExample]
    _: KW_ONLY
    examples_per_step: int
    rank: int
    world_size: int
    seed: int
    share_prefix: bool
    max_tokens: int
    tree_of: Callable[[EncodedExample], Tree] = target_tree
    count_of: Callable[[EncodedExample], float] = target_tokens
    packing: Packing = Packing.PACKED

    def __post_init__(self) -> None:
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for `epoch`."""
        self._order = epoch_order(len(self.examples), seed=self.seed, epoch=epoch)

    def __len__(self) -> int:
        return -(-len(self.examples) // self.examples_per_step)

    def __getitem__(self, step: int) -> TrainingStep:
        if not 0 <= step < len(self):
            raise IndexError(step)
        start = step * self.examples_per_step
        chosen = [self.examples[i] for i in self._order[start : start + self.examples_per_step]]
        shares = [self._plan(chosen[rank :: self.world_size]) for rank in range(self.world_size)]
        packs = _as_many_on_every_rank(shares, self.packing)
        sizes = [[pack.size for pack in share] for share in packs]
        return TrainingStep(
            sequences=[pack.lay() for pack in packs[self.rank]],
            denominator=sum(self.count_of(example) for example in chosen),
            example_rows=[example.row for example in chosen[self.rank :: self.world_size]],
            sizes_of_ranks=[list(of_one) for of_one in zip(*sizes, strict=True)],
        )

    def _plan(self, examples: Sequence[EncodedExample]) -> Sequence[Pack | Batch]:
        trees = [self.tree_of(example) for example in examples]
        if self.packing.is_apart:
            return plan_batches(trees, max_tokens=self.max_tokens, packing=self.packing)
        return plan_packs(trees, max_tokens=self.max_tokens, share_prefix=self.share_prefix)


def _as_many_on_every_rank(
    shares: Sequence[Sequence[Pack | Batch]], packing: Packing
) -> list[list[Pack | Batch]]:
    """The ranks' sequences, with empty ones where a rank has fewer than another: under FSDP every
    rank must run the same number of forwards and backwards.
    """
    count = max(len(share) for share in shares)
    empty = Batch(()) if packing.is_apart else EMPTY
    filled = [[*share, *[empty] * (count - len(share))] for share in shares]
    if packing is not Packing.SINGLE:
        return filled
    at_once = [cast(tuple[Batch, ...], ones) for ones in zip(*filled, strict=True)]
    most = [max(len(batch.apart) for batch in batches) for batches in at_once]
    return [
        [replace(batch, at_least=least) for batch, least in zip(batches, most, strict=True)]
        for batches in zip(*at_once, strict=True)
    ]


@dataclass
class ScoringSequence:
    """One packed sequence to score.

    Attributes:
        sequence: it.
        examples: indices into the scored set, in the sequence's order.
        answers: which of its answers each of `examples` is scored with; `None` = with all.
    """

    sequence: PackedSequence
    examples: list[int]
    answers: list[int] | None = None

    def pin_memory(self) -> ScoringSequence:
        """The same in page-locked memory."""
        return replace(self, sequence=self.sequence.pin_memory())


class ScoringSequences(Dataset[ScoringSequence]):
    """This rank's packed sequences of a set whose answers are to be scored.

    An example's answers are the texts that its task's kind of answer scores. The division into
    sequences does not depend on the number of ranks, so neither do the scores; every rank has as
    many, and every example is in exactly one of them.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        *,
        rank: int,
        world_size: int,
        max_tokens: int,
        packing: Packing = Packing.PACKED,
    ) -> None:
        self.examples = examples
        self.answers = [example.scored_ids for example in examples]
        self._asked: list[tuple[int, int]] = []
        packs: Sequence[Pack | Batch]
        if packing.is_apart:
            counts = [len(answers) for answers in self.answers]
            self._asked = [(i, a) for i, count in enumerate(counts) for a in range(count)]
            trees = [
                Tree(
                    examples[i].prompt_ids, [self.answers[i][a]], given=examples[i].given[a : a + 1]
                )
                for i, a in self._asked
            ]
            packs = plan_batches(trees, max_tokens=max_tokens, packing=packing)
        else:
            trees = [
                Tree(example.prompt_ids, answers, given=example.given)
                for example, answers in zip(examples, self.answers, strict=True)
            ]
            packs = plan_packs(trees, max_tokens=max_tokens, share_prefix=True)
        self._packing = packing
        self._packs = packs[rank::world_size]
        self._length = -(-len(packs) // world_size)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> ScoringSequence:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if not self._packing.is_apart:
            if index >= len(self._packs):
                return ScoringSequence(empty_sequence(), [])
            pack = self._packs[index]
            return ScoringSequence(pack.lay(), list(pack.indices))
        pack = self._packs[index] if index < len(self._packs) else Batch(())
        asked = [self._asked[i] for i in pack.indices]
        return ScoringSequence(pack.lay(), [i for i, _ in asked], [a for _, a in asked])
