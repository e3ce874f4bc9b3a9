"""A look at the rows of a task before any time is spent on training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fsdp.data.rows import TaskData
from lora_fsdp.tasks import Example, Task

if TYPE_CHECKING:
    from lora_fsdp.data.encoding import EncodedExample

_FEW_ROWS = 10
_SKEWED = 20
_SHOWN = 60  # characters of a row


@dataclass(frozen=True)
class TaskCheck:
    """What was found in a task's rows.

    Attributes:
        task: the task, bound to its table.
        training_rows, held_out_rows, test_rows, left_out: numbers of rows.
        splits: where these come from, a line each.
        balance: for each label its training rows and those that are reported; empty without a
            label set.
        repeated: rows whose text occurs in another row as well.
        contradicting: texts that occur with more than one answer.
        shortened: rows whose text does not fit; `None` without a tokenizer.
        concerns: what may spoil the result, a sentence each, by what it is about.
    """

    task: Task
    training_rows: int
    held_out_rows: int
    test_rows: int
    left_out: int
    splits: Sequence[str]
    balance: Mapping[str, tuple[int, int]]
    repeated: int
    contradicting: int
    shortened: int | None
    concerns: Mapping[str, str]

    @property
    def warnings(self) -> list[str]:
        """The sentences of `concerns`."""
        return list(self.concerns.values())


def check_task_data(data: TaskData, encoded: Sequence[EncodedExample] | None) -> TaskCheck:
    """Counts and warnings for training and held-out rows.

    Args:
        data: what `load_task_data` found.
        encoded: its examples as tokens, if there is a tokenizer.
    """
    examples = [*data.train, *data.scored]
    answers: dict[str, list[str]] = {}
    for example in examples:
        answers.setdefault(_asked(example), []).append(example.target or "")
    balance = _balance(data)
    contradicting = sum(len(set(targets)) > 1 for targets in answers.values())
    shortened = None if encoded is None else sum(example.shortened for example in encoded)
    return TaskCheck(
        task=data.task,
        training_rows=len(data.train),
        held_out_rows=len(data.held_out),
        test_rows=len(data.test),
        left_out=data.dropped,
        splits=data.splits,
        balance=balance,
        repeated=sum(len(targets) for targets in answers.values() if len(targets) > 1),
        contradicting=contradicting,
        shortened=shortened,
        concerns=_leak(data) | _concerns(balance, contradicting, shortened, rows=len(examples)),
    )


def row_digests(examples: Sequence[Example]) -> list[str]:
    """For each example a digest of what it asks, by which it is known again without its text."""
    return [hashlib.sha256(_asked(one).encode()).hexdigest()[:16] for one in examples]


def known_again(examples: Sequence[Example], digests: Collection[str]) -> list[Example]:
    """Those of `examples` whose digest is one of `digests`."""
    found = zip(examples, row_digests(examples), strict=True)
    return [example for example, digest in found if digest in digests]


def named_row(example: Example) -> str:
    """A row by its number and how its text begins, for a sentence."""
    text = " ".join(example.prompt.content.split())
    begin = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    return f"row {example.row}: {begin!r}"


def _leak(data: TaskData) -> dict[str, str]:
    """Rows that are scored and were trained on: of one's own splits, since ours keep them apart."""
    leaked = known_again(data.scored, set(row_digests(data.train)))
    if not leaked:
        return {}
    return {
        "held-out-trained-on": f"{len(leaked)} of {len(data.scored)} held-out rows are trained on "
        f"as well, so that their scores say nothing of new rows; the first is "
        f"{named_row(leaked[0])}."
    }


def _asked(example: Example) -> str:
    """What the row asks; the same question with other choices is another one."""
    return "\n".join([example.prompt.content.strip(), *example.choices])


def _balance(data: TaskData) -> dict[str, tuple[int, int]]:
    kind = data.task.answer_kind

    def counts(examples: Sequence[Example]) -> Counter[str]:
        return Counter(kind.answer_of(example) for example in examples)

    train, held_out = counts(data.train), counts(data.reported)
    return {label: (train[label], held_out[label]) for label in kind.labels}


def _concerns(
    balance: Mapping[str, tuple[int, int]], contradicting: int, shortened: int | None, *, rows: int
) -> dict[str, str]:
    found = {}
    if few := [label for label, (train, _) in balance.items() if train < _FEW_ROWS]:
        found["few-rows-of-a-label"] = f"Fewer than {_FEW_ROWS} training rows: {_listed(few)}."
    if unseen := [label for label, (_, held_out) in balance.items() if held_out == 0]:
        found["label-not-held-out"] = (
            f"No held-out row, so nothing is measured of them: {_listed(unseen)}."
        )
    totals = [sum(counts) for counts in balance.values()]
    if totals and max(totals) > _SKEWED * max(min(totals), 1):
        found["labels-skewed"] = (
            f"The commonest label has {max(totals)} rows and the rarest {min(totals)}: judge by "
            "macro_f1, not by accuracy."
        )
    folded = Counter(" ".join(label.casefold().split()) for label in balance)
    if alike := [label for label in balance if folded[" ".join(label.casefold().split())] > 1]:
        found["labels-alike"] = f"Labels that differ in case or blanks only: {_listed(alike)}."
    if contradicting:
        found["answers-contradict"] = f"{contradicting} texts occur with more than one answer."
    if shortened and shortened > rows / 20:
        found["rows-shortened"] = (
            f"{shortened} of {rows} rows are shortened to --max_length: raise it if the end of a "
            "text matters."
        )
    return found


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels))
