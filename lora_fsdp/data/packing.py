"""Many examples in one row without padding, and the prefix they share only once.

A row is a tree laid flat. Its trunk is the token prefix that all examples share; each example grows
from it, and from each example grow its answers (one when training, every label when scoring)::

    shared prefix ─┬─ example 1 ─┬─ answer 1
                   │             └─ answer 2
                   └─ example 2 ─┬─ ...

A token sees what stands before it on its own path to the root and nothing else
(`lora_fsdp.compute.attention`), and its position counts along that path, so every example is
computed exactly as if it stood alone. Prior art: DPO prefix sharing (arXiv 2410.20305), Prefix
Grouper (arXiv 2506.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import NamedTuple

import torch

#: `PackedSequence.example_ids` of the tokens that every example of the row sees.
SHARED = 0
#: `PackedSequence.example_ids` and `PackedSequence.label_answers` of what only fills a row up.
PADDING = -1


@dataclass(frozen=True, slots=True)
class Tree:
    """One example's tokens: a prompt and the answers that continue it (end token included)."""

    prompt_ids: list[int]
    answers: Sequence[list[int]]

    def __len__(self) -> int:
        """Tokens this example takes in a row of its own (an answer's last token is no input)."""
        return len(self.prompt_ids) + sum(len(answer[:-1]) for answer in self.answers)


class SequenceSize(NamedTuple):
    """What a row has, without the row.

    Attributes:
        tokens: input tokens.
        labels: label tokens.
        is_one_sequence: whether every token sees all before it, as in an ordinary text.
    """

    tokens: int
    labels: int
    is_one_sequence: bool


@dataclass(frozen=True)
class PackedSequence:
    """One packed row: T input tokens and L label tokens.

    Attributes:
        tokens: [4, T] int64: `input_ids`; `position_ids`, counted along each token's path to the
            root; `example_ids`, 0 for the shared prefix, 1.. for the examples, -1 for padding;
            `answer_ids`, 0 for prompts, 1.. for the answers of an example.
        labels: [3, L] int64: `label_positions`, the input token whose output predicts each label
            token; `label_ids`, the label tokens; `label_answers`, which answer of the row (0-based,
            over all examples) each belongs to, -1 for padding.
        is_one_sequence: whether every token sees all before it, as in an ordinary text.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    is_one_sequence: bool = False

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
        """The row on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PackedSequence:
        """The row in page-locked memory, from which copies to a GPU are asynchronous."""
        return replace(self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory())

    def padded(self, *, tokens: int, labels: int) -> PackedSequence:
        """The row with `tokens` tokens and `labels` label tokens; what is added counts nothing.

        Padding stands at the end, so a row that is one sequence can still be computed as one.
        """
        more_tokens, more_labels = tokens - len(self), labels - self.labels.shape[1]
        if more_tokens < 0 or more_labels < 0:
            raise ValueError(f"A row of {len(self)} tokens cannot be padded to {tokens}.")
        token = torch.tensor([0, 0, PADDING, 0])[:, None].expand(4, more_tokens)
        label = torch.tensor([0, 0, PADDING])[:, None].expand(3, more_labels)
        return replace(
            self,
            tokens=torch.cat([self.tokens, token], 1),
            labels=torch.cat([self.labels, label], 1),
        )


def pack_sequence(trees: Sequence[Tree], *, share_prefix: bool) -> PackedSequence:
    """Lay `trees` flat in one row, in order.

    With `share_prefix` the longest token prefix common to all prompts is laid down once.
    """
    prefix = common_prefix(trees) if share_prefix else []
    input_ids, position_ids = list(prefix), list(range(len(prefix)))
    example_ids, answer_ids = [SHARED] * len(prefix), [0] * len(prefix)
    labels: list[tuple[int, int, int]] = []
    answers_before = 0

    def lay(ids: list[int], *, start: int, example: int, answer: int) -> None:
        input_ids.extend(ids)
        position_ids.extend(range(start, start + len(ids)))
        example_ids.extend([example] * len(ids))
        answer_ids.extend([answer] * len(ids))

    for example, tree in enumerate(trees, start=1):
        lay(tree.prompt_ids[len(prefix) :], start=len(prefix), example=example, answer=0)
        # A prompt that is the prefix itself ends where the prefix ends.
        whole_prompt_shared = len(tree.prompt_ids) == len(prefix)
        prompt_end = (len(prefix) if whole_prompt_shared else len(input_ids)) - 1
        for number, answer in enumerate(tree.answers, start=1):
            first = len(input_ids)
            lay(answer[:-1], start=len(tree.prompt_ids), example=example, answer=number)
            positions = [prompt_end, *range(first, len(input_ids))][: len(answer)]
            owner = answers_before + number - 1
            labels += [(at, token, owner) for at, token in zip(positions, answer, strict=True)]
        answers_before += len(tree.answers)

    return PackedSequence(
        torch.tensor([input_ids, position_ids, example_ids, answer_ids], dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64).reshape(-1, 3).t().contiguous(),
        is_one_sequence=_is_one_sequence(trees),
    )


def packed_size(trees: Sequence[Tree], *, share_prefix: bool) -> SequenceSize:
    """The size of the row that `pack_sequence` would make of `trees`."""
    shared = len(common_prefix(trees)) if share_prefix else 0
    return SequenceSize(
        tokens=shared + sum(len(tree) - shared for tree in trees),
        labels=sum(len(answer) for tree in trees for answer in tree.answers),
        is_one_sequence=_is_one_sequence(trees),
    )


def _is_one_sequence(trees: Sequence[Tree]) -> bool:
    return len(trees) == 1 and len(trees[0].answers) <= 1


def empty_sequence() -> PackedSequence:
    """A row of one token and no labels, for a rank that has fewer rows than the others.

    Under FSDP every rank must run the same number of forwards and backwards.
    """
    return pack_sequence([Tree(prompt_ids=[0], answers=())], share_prefix=False)


def common_prefix(trees: Sequence[Tree]) -> list[int]:
    """The longest token prefix of all prompts."""
    # Documented for any sequences, not only paths: it compares element by element.
    return list(commonprefix([tree.prompt_ids for tree in trees]))  # noqa: RUF071


def plan_sequences(
    trees: Sequence[Tree], *, max_tokens: int, share_prefix: bool
) -> list[list[int]]:
    """Divide `trees` over as few rows as in-order filling gives; returns indices into `trees`.

    A row is longer than `max_tokens` only if a single example is.
    """
    shared = len(common_prefix(trees)) if share_prefix and trees else 0
    rows: list[list[int]] = []
    used = max_tokens + 1
    for index, tree in enumerate(trees):
        extra = len(tree) - shared
        if not rows or used + extra > max_tokens:
            rows.append([])
            used = shared
        rows[-1].append(index)
        used += extra
    return rows
