"""Scores on a scale, such as stars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pandas as pd

from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks.answers import OrderedScores
from lora_fsdp.tasks.cells import cell_text
from lora_fsdp.tasks.classification import ClassificationTask
from lora_fsdp.tasks.registry import register_task

_MOST_LEVELS = 101


@register_task
class RatingTask(ClassificationTask):
    """A score for each text: 1 to 5, 0 to 10, or any other numbers.

    `labels` are the levels; `None` = the numbers that occur in the table. 4 and 4.0 are one level.
    """

    name = "rating"
    description = "A score on a scale of numbers for each text, such as stars"
    primary_metric = "quadratic_kappa"

    instruction = (
        "Which score fits the following text? Output exactly one number, with no extra text:"
    )
    layouts = (
        ("text", "rating"),
        ("text", "score"),
        ("text", "stars"),
        ("review", "rating"),
        ("review", "stars"),
        ("text", "label"),
    )

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            instruction=instruction,
            text_column=text_column,
            label_column=label_column,
            labels=labels,
        )
        if self.labels is None:
            return
        for label in self.labels:
            if number_of(label) is None:
                raise ArgumentError(f"--labels of a score must be numbers, not {label!r}.")
        levels = [number_text(label) for label in self.labels]
        if len(levels) < 2 or len(set(levels)) < len(levels):
            raise ArgumentError(
                f"--labels of a score must be two numbers or more, none twice: {levels}."
            )
        self.labels = tuple(sorted(levels, key=float))

    @property
    def answer_kind(self) -> OrderedScores:
        """Levels in their order."""
        return OrderedScores(self.labels or (), self.target_of)

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Self:
        """As in the base class; levels are numbers, in ascending order."""
        task = self._with_columns(table, with_labels=with_labels)
        if with_labels:
            table = task._with_levels(table)
        task = super().bind(table, with_labels=with_labels, for_training=for_training)
        if task.labels is not None:
            task.labels = tuple(sorted(task.labels, key=float))
            if len(task.labels) > _MOST_LEVELS:
                raise ArgumentError(
                    f"Column {task.label_column!r} holds {len(task.labels)} different numbers, "
                    f"more than the {_MOST_LEVELS} levels that a scale may have: round them, or "
                    "name the levels with --labels."
                )
        return task

    def bad_rows(self, table: pd.DataFrame, *, with_labels: bool = True) -> pd.Series:
        """As in the base class; a label that is no number is named."""
        task = self._with_columns(table, with_labels=with_labels)
        if not with_labels:
            return super().bad_rows(table, with_labels=False)
        faults = super().bad_rows(task._with_levels(table), with_labels=True)
        column = str(task.label_column)
        for place, cell in zip(table.index, table[column], strict=True):
            known = place in faults.index and not str(faults[place]).startswith("label ")
            if not known and number_of(cell) is None:
                faults[place] = f"column {column!r} holds {cell_text(cell)[:40]!r}, no number"
        return faults.sort_index()

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The row's level, after a space."""
        return self.target_of(number_text(row[str(self.label_column)]))

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """See `OrderedScores.metrics`."""
        self._label_set()
        return self.answer_kind.metrics(targets, predictions)

    def _with_levels(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table, in which every number of the label column has its one spelling."""
        column = str(self.label_column)
        cells = [cell if number_of(cell) is None else number_text(cell) for cell in table[column]]
        return table.assign(**{column: pd.Series(cells, table.index, dtype=object)})


def number_of(cell: object) -> float | None:
    """A cell as a finite number, or `None`."""
    try:
        number = float(cell_text(cell))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def number_text(cell: object) -> str:
    """A cell's number in one spelling: 4, 4.0 and "4.00" are "4"; 2.5 is "2.5"."""
    number = number_of(cell)
    if number is None:
        raise ValueError(f"{cell!r} is no number")
    return str(int(number)) if number.is_integer() else repr(number)
