"""Which rows each adapter of several learns from, and on which it is scored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lora_fsdp.data.rows import TaskData
from lora_fsdp.data.splits import split_table
from lora_fsdp.errors import SplitError
from lora_fsdp.tasks import Example, Task


@dataclass(frozen=True)
class RowsOfRun:
    """Examples for all adapters of a run.

    Attributes:
        train, held_out: of each fold, or of the one division that all share.
        test: told once, of the best setting; none where nothing is chosen.
    """

    train: list[list[Example]]
    held_out: list[list[Example]]
    test: list[Example]

    def of(self, fold: int | None) -> tuple[list[Example], list[Example]]:
        """The training and the held-out examples of an adapter."""
        place = fold or 0
        return self.train[place], self.held_out[place]


def rows_of_run(
    data: TaskData, *, folds: int | None, chooses: bool, eval_size: float, seed: int
) -> RowsOfRun:
    """Divide the examples.

    Args:
        data: the run's.
        folds: each example is held out by one of so many adapters.
        chooses: whether a setting is to be chosen: by validation rows, which are taken out of the
            training rows; the held-out rows are the test then.
        eval_size: share or number of the validation rows.
        seed: of the division.

    Raises:
        SplitError: there are too few rows or different texts.
    """
    if folds is not None:
        everything = sorted([*data.train, *data.held_out], key=lambda example: example.row)
        numbers = fold_numbers(data.task, everything, folds=folds, seed=seed)
        return RowsOfRun(
            train=[_where(everything, numbers != fold) for fold in range(folds)],
            held_out=[_where(everything, numbers == fold) for fold in range(folds)],
            test=[],
        )
    if not chooses:  # nothing is decided by them, so the user's own test is what is told
        return RowsOfRun([data.train], [[*data.test] or data.held_out], [])
    if data.test:  # nothing else is held back for it
        return RowsOfRun([data.train], [data.held_out], [*data.test])
    table = _as_table(data.task, data.train)
    train, validation = split_table(
        table, text_column="text", label_column="label", test_size=eval_size, seed=seed
    )
    return RowsOfRun(
        [[data.train[place] for place in train.index]],
        [[data.train[place] for place in validation.index]],
        data.held_out,
    )


def fold_numbers(task: Task, examples: Sequence[Example], *, folds: int, seed: int) -> np.ndarray:
    """[examples] which fold holds each out: seeded, stratified by label, equal texts together.

    Raises:
        SplitError: there are too few different texts.
    """
    table = _as_table(task, examples)
    different = table["text"].nunique()
    if different < folds:
        raise SplitError(
            f"--folds {folds} needs as many different texts, and there are {different}: lower it."
        )
    # Here, because most runs divide nothing into folds, and it takes half a second to import.
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    numbers = np.zeros(len(table), dtype=int)
    labels = table["label"].where(table["label"].map(table["label"].value_counts()) >= folds, "")
    if (labels == "").sum() < folds:  # too rare together, too: they follow the commonest
        labels = labels.where(labels != "", labels.mode()[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        parts = splitter.split(table, labels, groups=table["text"])
        for number, (_, held_out) in enumerate(parts):
            numbers[held_out] = number
    if empty := [number + 1 for number in range(folds) if not (numbers == number).any()]:
        raise SplitError(
            f"--folds {folds}: fold {empty[0]} would be empty, as rows with the same text stay "
            "together: lower it."
        )
    return numbers


def _as_table(task: Task, examples: Sequence[Example]) -> pd.DataFrame:
    closed = bool(task.answer_kind.labels)
    return pd.DataFrame(
        {
            "text": [example.prompt.content.strip() for example in examples],
            "label": [str(example.target) if closed else "-" for example in examples],
        }
    )


def _where(examples: Sequence[Example], chosen: np.ndarray) -> list[Example]:
    return [example for example, keep in zip(examples, chosen, strict=True) if keep]
