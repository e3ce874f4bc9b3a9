"""Many examples in one sequence without padding, and the prefix they share only once.

A packed sequence is a flattened tree. Its trunk is the token prefix that all examples share; each
example grows from it, and from each example grow its answers (the target when training, every label
when scoring)::

    shared prefix ─┬─ example 1 ─┬─ answer 1
                   │             └─ answer 2
                   └─ example 2 ─┬─ ...

A token sees what stands before it on its own path to the root and nothing else
(`lora_fsdp.compute.attention`), and its position counts along that path, so every example is
computed exactly as if it stood alone. Prior art: DPO prefix sharing (arXiv 2410.20305), Prefix
Grouper (arXiv 2506.05433).

Where a model cannot keep the examples of one sequence apart, every answer stands behind its prompt
in a sequence of its own, without a mask: `Batch` lays several of them beside each other, filled up
on the right to one length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from os.path import commonprefix
from typing import NamedTuple

import torch
from torch.nn import functional

#: `PackedSequence.example_ids` of the tokens that every example of the sequence sees.
SHARED = 0
#: `PackedSequence.example_ids`, `.label_answers` and `.answer_examples` of what only fills up.
PADDING = -1


class Packing(StrEnum):
    """How examples are laid into sequences.

    PACKED: many in one, kept apart by a mask. BATCHED: each answer behind its prompt in a sequence
    of its own, several of them filled up on the right and computed at once. SINGLE: the same, each
    computed alone.
    """

    PACKED = "packed"
    BATCHED = "batched"
    SINGLE = "single"

    @property
    def is_apart(self) -> bool:
        """Whether no two examples share a sequence."""
        return self is not Packing.PACKED


@dataclass(frozen=True, slots=True)
class Tree:
    """One example's tokens: a prompt and the answers that continue it (end token included).

    Attributes:
        prompt_ids: the prompt.
        answers: each with a token at least.
        targets: a number for each answer, whose meaning is the objective's; empty = 1.
        given: how many tokens at the beginning of each answer are given and not label tokens, fewer
            than it has; empty = none.
    """

    prompt_ids: list[int]
    answers: Sequence[list[int]]
    targets: Sequence[float] = ()
    given: Sequence[int] = ()

    @property
    def labels(self) -> int:
        """Its label tokens."""
        return sum(map(len, self.answers)) - sum(self.given)

    def __len__(self) -> int:
        """Tokens of this example alone in a sequence (an answer's last token is no input)."""
        return len(self.prompt_ids) + sum(len(answer[:-1]) for answer in self.answers)


class SequenceSize(NamedTuple):
    """What a packed sequence has, without the sequence.

    Attributes:
        tokens: input tokens.
        labels: label tokens.
        is_one_sequence: whether every token sees all before it, as in an ordinary text.
    """

    tokens: int
    labels: int
    is_one_sequence: bool


class Segment(NamedTuple):
    """Neighbouring tokens of one part of the tree.

    Attributes:
        example, answer: as in `PackedSequence.example_ids` and `.answer_ids`.
        start: place of the first token in the sequence.
        length: tokens.
    """

    example: int
    answer: int
    start: int
    length: int


@dataclass(frozen=True)
class PackedSequence:
    """T input tokens, L label tokens and A answers.

    Attributes:
        tokens: [4, T] int64: `input_ids`; `position_ids`, counted along each token's path to the
            root; `example_ids`, 0 for the shared prefix, 1.. for the examples, -1 for padding;
            `answer_ids`, 0 for prompts, 1.. for the answers of an example.
        labels: [3, L] int64: `label_positions`, the input token whose output predicts each label
            token; `label_ids`, the label tokens; `label_answers`, which answer of the sequence
            (0-based, over all examples) each belongs to, -1 for padding.
        answer_examples: [A] int64, which example of the sequence (0-based) each answer belongs to,
            -1 for padding. A padded sequence has as many answers as label tokens.
        answer_targets: [A] float32, the trees' `targets`, 0 for padding.
        is_one_sequence: whether every token sees all before it, as in an ordinary text.
        apart: empty, or the sizes of the sequences without a mask that it is a batch of. They stand
            one after another, each filled up on the right to the same length.
        segments: the parts of the tree that have tokens, parents first; known without the device.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    answer_examples: torch.Tensor
    answer_targets: torch.Tensor
    is_one_sequence: bool = False
    apart: tuple[SequenceSize, ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def input_ids(self) -> torch.Tensor:
        """[T]."""
        return self.tokens[0]

    @property
    def position_ids(self) -> torch.Tensor:
        """[T]."""
        return self.tokens[1]

    @property
    def example_ids(self) -> torch.Tensor:
        """[T]."""
        return self.tokens[2]

    @property
    def answer_ids(self) -> torch.Tensor:
        """[T]."""
        return self.tokens[3]

    @property
    def label_positions(self) -> torch.Tensor:
        """[L]."""
        return self.labels[0]

    @property
    def label_ids(self) -> torch.Tensor:
        """[L]."""
        return self.labels[1]

    @property
    def label_answers(self) -> torch.Tensor:
        """[L]."""
        return self.labels[2]

    def __len__(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def size(self) -> SequenceSize:
        """Its numbers of tokens."""
        return SequenceSize(len(self), int(self.labels.shape[1]), self.is_one_sequence)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> PackedSequence:
        """The sequence on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedSequence:
        """The sequence in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._with_each(torch.Tensor.pin_memory)

    def copy_(self, other: PackedSequence) -> None:
        """Put the numbers of `other`, which has the same size, into this one's memory."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs, non_blocking=True)

    def padded(self, *, tokens: int, labels: int) -> PackedSequence:
        """The sequence with `tokens` tokens and `labels` label tokens; the added count nothing.

        Padding stands at the end, so what is one sequence can still be computed as one. There are
        as many answers afterwards as label tokens, so that the number follows from the size.
        """
        more_tokens, more_labels = tokens - len(self), labels - self.labels.shape[1]
        if more_tokens < 0 or more_labels < 0:
            raise ValueError(f"A sequence of {len(self)} tokens cannot be padded to {tokens}.")
        token = torch.tensor([0, 0, PADDING, 0])[:, None].expand(4, more_tokens)
        label = torch.tensor([0, 0, PADDING])[:, None].expand(3, more_labels)
        more_answers = labels - len(self.answer_examples)
        return replace(
            self,
            tokens=torch.cat([self.tokens, token], 1),
            labels=torch.cat([self.labels, label], 1),
            answer_examples=functional.pad(self.answer_examples, (0, more_answers), value=PADDING),
            answer_targets=functional.pad(self.answer_targets, (0, more_answers)),
        )

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.labels, self.answer_examples, self.answer_targets

    def _with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedSequence:
        tokens, labels, examples, targets = map(change, self._tensors())
        return replace(
            self, tokens=tokens, labels=labels, answer_examples=examples, answer_targets=targets
        )

    def singles(self) -> list[PackedSequence]:
        """Each sequence of a batch as a batch of its own, without what fills it up."""
        width, label, found = len(self) // len(self.apart), 0, []
        for place, size in enumerate(self.apart):
            start, labels = place * width, self.labels[:, label : label + size.labels]
            shift = torch.tensor([start, 0, 0], device=labels.device)[:, None]
            tokens = self.tokens[:, start : start + size.tokens]
            found.append(replace(self, tokens=tokens, labels=labels - shift, apart=(size,)))
            label += size.labels
        return found


@dataclass(frozen=True)
class Pack:
    """Trees that are flattened into one sequence, in order.

    Attributes:
        trees: one for each example.
        share_prefix: whether the longest token prefix common to all prompts stands there once.
        indices: of the trees among those that were planned (`plan_packs`).
    """

    trees: Sequence[Tree]
    share_prefix: bool
    indices: Sequence[int] = ()

    @cached_property
    def shared(self) -> int:
        """Tokens of the shared prefix; computed once for the plan, the size and the sequence."""
        return len(common_prefix(self.trees)) if self.share_prefix and self.trees else 0

    @property
    def size(self) -> SequenceSize:
        """Of the sequence that `lay` makes."""
        return SequenceSize(
            tokens=self.shared + sum(len(tree) - self.shared for tree in self.trees),
            labels=sum(tree.labels for tree in self.trees),
            is_one_sequence=len(self.trees) == 1 and len(self.trees[0].answers) <= 1,
        )

    def lay(self) -> PackedSequence:
        """The packed sequence."""
        builder = _SequenceBuilder(self.trees[0].prompt_ids[: self.shared])
        for tree in self.trees:
            builder.add(tree)
        return builder.sequence(is_one_sequence=self.size.is_one_sequence)


@dataclass(frozen=True)
class Batch:
    """Trees of which every answer stands behind its prompt in a sequence of its own.

    Attributes:
        trees, indices: as of a `Pack`.
        at_least: so many sequences, the last ones empty: ranks that compute them one by one must
            run as many forwards.
    """

    trees: Sequence[Tree]
    indices: Sequence[int] = ()
    at_least: int = 1

    @cached_property
    def apart(self) -> tuple[SequenceSize, ...]:
        """The sizes of its sequences."""
        sizes = [
            SequenceSize(len(tree.prompt_ids) + len(answer[:-1]), len(answer) - given, True)
            for tree in self.trees
            for answer, given in zip(
                tree.answers, tree.given or [0] * len(tree.answers), strict=True
            )
        ]
        return tuple(sizes + [SequenceSize(1, 0, True)] * (self.at_least - len(sizes)))

    @property
    def size(self) -> SequenceSize:
        """Of all its sequences together, with what fills them up."""
        width = max(size.tokens for size in self.apart)
        return SequenceSize(
            tokens=width * len(self.apart),
            labels=sum(size.labels for size in self.apart),
            is_one_sequence=False,
        )

    def lay(self) -> PackedSequence:
        """The batch."""
        width = max(size.tokens for size in self.apart)
        places = iter(range(0, width * len(self.apart), width))
        tokens = torch.tensor([0, 0, PADDING, 0])[:, None].repeat(1, width * len(self.apart))
        labels: list[tuple[int, int, int]] = []
        examples: list[int] = []
        targets: list[float] = []
        for example, tree in enumerate(self.trees):
            length = len(tree.prompt_ids)
            weights = tree.targets or [1.0] * len(tree.answers)
            given = tree.given or [0] * len(tree.answers)
            branches = zip(tree.answers, weights, given, strict=True)
            for number, (answer, target, unlabelled) in enumerate(branches, start=1):
                start, ids = next(places), [*tree.prompt_ids, *answer[:-1]]
                of_answer = [0] * length + [number] * (len(ids) - length)
                tokens[:, start : start + len(ids)] = torch.tensor(
                    [ids, range(len(ids)), [example + 1] * len(ids), of_answer]
                )
                first = start + length - 1
                own = [(first + at, token, len(examples)) for at, token in enumerate(answer)]
                labels += own[unlabelled:]
                examples.append(example)
                targets.append(target)
        return PackedSequence(
            tokens,
            torch.tensor(labels, dtype=torch.int64).reshape(-1, 3).t().contiguous(),
            torch.tensor(examples, dtype=torch.int64),
            torch.tensor(targets, dtype=torch.float32),
            apart=self.apart,
        )


class _SequenceBuilder:
    """Builds a packed sequence, tree by tree."""

    def __init__(self, prefix: list[int]) -> None:
        self._shared = len(prefix)
        # By kind and not by token, which torch takes over faster.
        self._tokens: tuple[list[int], ...] = ([], [], [], [])
        self._labels: list[tuple[int, int, int]] = []
        self._examples: list[int] = []
        self._targets: list[float] = []
        self._segments: list[Segment] = []
        self._trees = 0
        self._lay(prefix, start=0, example=SHARED, answer=0)

    def add(self, tree: Tree) -> None:
        """What follows the shared prefix in the tree's prompt, then its answers."""
        self._trees += 1
        example, shared = self._trees, self._shared
        self._lay(tree.prompt_ids[shared:], start=shared, example=example, answer=0)
        # A prompt that is the prefix itself ends where the prefix ends.
        whole_prompt_shared = len(tree.prompt_ids) == shared
        prompt_end = (shared if whole_prompt_shared else len(self._tokens[0])) - 1
        targets = tree.targets or [1.0] * len(tree.answers)
        given = tree.given or [0] * len(tree.answers)
        branches = zip(tree.answers, targets, given, strict=True)
        for number, (ids, target, unlabelled) in enumerate(branches, start=1):
            first = len(self._tokens[0])
            self._lay(ids[:-1], start=len(tree.prompt_ids), example=example, answer=number)
            positions = [prompt_end, *range(first, len(self._tokens[0]))][: len(ids)]
            owner = len(self._examples)
            labels = list(zip(positions, ids, strict=True))[unlabelled:]
            self._labels += [(at, token, owner) for at, token in labels]
            self._examples.append(example - 1)
            self._targets.append(target)

    def sequence(self, *, is_one_sequence: bool) -> PackedSequence:
        """The packed sequence of the trees added so far."""
        return PackedSequence(
            torch.tensor(self._tokens, dtype=torch.int64),
            torch.tensor(self._labels, dtype=torch.int64).reshape(-1, 3).t().contiguous(),
            torch.tensor(self._examples, dtype=torch.int64),
            torch.tensor(self._targets, dtype=torch.float32),
            is_one_sequence=is_one_sequence,
            segments=tuple(self._segments),
        )

    def _lay(self, ids: list[int], *, start: int, example: int, answer: int) -> None:
        input_ids, position_ids, example_ids, answer_ids = self._tokens
        if ids:
            self._segments.append(Segment(example, answer, len(input_ids), len(ids)))
        input_ids.extend(ids)
        position_ids.extend(range(start, start + len(ids)))
        example_ids.extend([example] * len(ids))
        answer_ids.extend([answer] * len(ids))


def pack_sequence(trees: Sequence[Tree], *, share_prefix: bool) -> PackedSequence:
    """Flatten `trees` into one packed sequence, in order.

    With `share_prefix` the longest token prefix common to all prompts stands there once.
    """
    return Pack(trees, share_prefix).lay()


#: One token and no labels, for a rank that has fewer packed sequences than the others: under FSDP
#: every rank must run the same number of forwards and backwards.
EMPTY = Pack([Tree(prompt_ids=[0], answers=())], share_prefix=False)


def empty_sequence() -> PackedSequence:
    """What `EMPTY` lays."""
    return EMPTY.lay()


def common_prefix(trees: Sequence[Tree]) -> list[int]:
    """The longest token prefix of all prompts."""
    # Documented for any sequences, not only paths: it compares element by element.
    return list(commonprefix([tree.prompt_ids for tree in trees]))  # noqa: RUF071


def plan_packs(trees: Sequence[Tree], *, max_tokens: int, share_prefix: bool) -> list[Pack]:
    """Divide `trees` over as few packed sequences as in-order filling gives.

    A sequence is longer than `max_tokens` only if a single example is.
    """
    everything = Pack(trees, share_prefix, range(len(trees)))
    shared = everything.shared
    filled: list[list[int]] = []
    used = max_tokens + 1
    for index, tree in enumerate(trees):
        extra = len(tree) - shared
        if not filled or used + extra > max_tokens:
            filled.append([])
            used = shared
        filled[-1].append(index)
        used += extra
    if len(filled) == 1:
        return [everything]
    return [Pack([trees[i] for i in indices], share_prefix, indices) for indices in filled]


def plan_batches(trees: Sequence[Tree], *, max_tokens: int, packing: Packing) -> list[Batch]:
    """Divide `trees` over batches of sequences of one answer each, like lengths with like.

    A batch with what fills it up is longer than `max_tokens` only if a single tree is; where
    sequences are computed one by one (`Packing.SINGLE`), a batch is one tree. All answers of a tree
    are in one batch, since an objective may compare them.
    """
    filled: list[list[int]] = []
    sequences = 0
    widths = [max((size.tokens for size in Batch([tree]).apart), default=1) for tree in trees]
    for index in sorted(range(len(trees)), key=widths.__getitem__):
        added = len(trees[index].answers)
        # In this order the last one sets the width.
        full = (sequences + added) * widths[index] > max_tokens
        if not filled or full or packing is Packing.SINGLE:
            filled.append([])
            sequences = 0
        filled[-1].append(index)
        sequences += added
    return [Batch([trees[i] for i in indices], indices) for indices in filled]
