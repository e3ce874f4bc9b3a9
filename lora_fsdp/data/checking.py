"""A look at the rows of a task before any time is spent on training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fsdp.data.rows import TaskData
from lora_fsdp.tasks import Example, Task

if TYPE_CHECKING:
    from lora_fsdp.data.encoding import EncodedExample

_FEW_ROWS = 10
_SKEWED = 20


@dataclass(frozen=True)
class TaskCheck:
    """What was found in a task's rows.

    Attributes:
        task: the task, bound to its table.
        training_rows, held_out_rows, left_out: numbers of rows.
        balance: for each label its training and its held-out rows; empty without a label set.
        repeated: rows whose text occurs in another row as well.
        contradicting: texts that occur with more than one answer.
        shortened: rows whose text does not fit; `None` without a tokenizer.
        concerns: what may spoil the result, a sentence each, by what it is about.
    """

    task: Task
    training_rows: int
    held_out_rows: int
    left_out: int
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
    examples = [*data.train, *data.held_out]
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
        left_out=data.dropped,
        balance=balance,
        repeated=sum(len(targets) for targets in answers.values() if len(targets) > 1),
        contradicting=contradicting,
        shortened=shortened,
        concerns=_concerns(balance, contradicting, shortened, rows=len(examples)),
    )


def row_digests(examples: Sequence[Example]) -> list[str]:
    """For each example a digest of what it asks, by which it is known again without its text."""
    return [hashlib.sha256(_asked(one).encode()).hexdigest()[:16] for one in examples]


def _asked(example: Example) -> str:
    """What the row asks; the same question with other choices is another one."""
    return "\n".join([example.prompt.content.strip(), *example.choices])


def _balance(data: TaskData) -> dict[str, tuple[int, int]]:
    kind = data.task.answer_kind

    def counts(examples: Sequence[Example]) -> Counter[str]:
        return Counter(kind.answer_of(example) for example in examples)

    train, held_out = counts(data.train), counts(data.held_out)
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
