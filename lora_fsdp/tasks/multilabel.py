"""Any number of labels for each text."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd

from lora_fsdp.errors import ArgumentError, SingleLabelError
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.tasks.answers.several_labels import (
    JOINT,
    NONE,
    SeveralLabels,
    chosen_thresholds,
)
from lora_fsdp.tasks.cells import cell_text, cell_value, label_text, records
from lora_fsdp.tasks.columns import ColumnTask
from lora_fsdp.tasks.example import Example
from lora_fsdp.tasks.registry import register_task


@register_task
class MultilabelTask(ColumnTask):
    """Every label that applies to a text, which may be several or none.

    A cell holds labels with a separator between them (`delivery; price`), or a list (in CSV a JSON
    list). `none`, or an empty list, says that no label applies; an empty cell says nothing.

    Attributes:
        labels: the label set; `None` = the labels that occur in the table, sorted.
        separator: what stands between the labels of a cell that is no list.
        thresholds: from which probability on a label is given: one number for all, or one for each
            label that is named; 0.5 otherwise.
    """

    name = "multilabel"
    description = "Any number of labels for each text, a yes or no for each of them"
    primary_metric = "micro_f1"

    cue = "\n"  # the labels are asked about after it
    instruction = "For each label, say whether it applies to the following text, yes or no:"
    text_column = "text"
    label_column = "labels"
    separator: str = ";"
    labels: Sequence[str] | None = None
    thresholds: float | Mapping[str, float] | None = None

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        labels: Sequence[str] | None = None,
        separator: str | None = None,
        thresholds: float | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(
            instruction=instruction, text_column=text_column, label_column=label_column
        )
        self.settle({"separator": separator})
        if labels is not None:
            self.labels = _checked(labels)
        self.thresholds = thresholds
        self._check_thresholds()

    @property
    def answer_kind(self) -> SeveralLabels:
        """A yes or no for each label."""
        known = self.labels or ()
        if isinstance(self.thresholds, Mapping):
            return SeveralLabels(known, self.thresholds)
        given = {} if self.thresholds is None else dict.fromkeys(known, float(self.thresholds))
        return SeveralLabels(known, given)

    def settled_by(self, table: pd.DataFrame) -> Self:
        """A copy with its labels.

        Raises:
            SingleLabelError: no row has a label.
        """
        if self.labels is not None:
            return self
        task = copy.copy(self)
        found = sorted({label for row in records(table) for label in self._labels_of(row)})
        if not found:
            raise SingleLabelError(
                f"No row has a label in column {self.label_column!r}: there is nothing to learn."
            )
        task.labels = tuple(found)
        task._check_thresholds()
        return task

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """No text, a cell that says nothing of labels, or a label that is none of the set."""
        if not cell_text(row[self.text_column]).strip():
            return f"nothing in column {self.text_column!r}"
        if not with_labels:
            return None
        column = f"column {self.label_column!r}"
        cell = cell_value(row[self.label_column])
        if isinstance(cell, dict):
            return f"{column} holds an object, no labels: {cell_text(cell)[:80]}"
        labels = self._labels_of(row)
        if not labels and cell != [] and not self._says_none(row):
            return f"nothing in column {self.label_column!r}; where no label applies, write none"
        if faulty := [label for label in labels if ";" in label or label.lower() == NONE]:
            return f"{column}: {faulty[0]!r} cannot be a label beside others"
        if len(set(labels)) < len(labels):
            return f"{column} names a label twice: {cell_text(row[self.label_column])[:80]!r}"
        if self.labels is not None and (
            unknown := [one for one in labels if one not in self.labels]
        ):
            return f"{column}: {unknown[0]!r} is none of {', '.join(map(repr, self.labels))}"
        return None

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The labels that apply, in the label set's order."""
        there = set(self._labels_of(row))
        return JOINT.join(label for label in self.labels or () if label in there) or NONE

    def build_shares(self, row: Mapping[str, Any]) -> tuple[float, ...]:
        """Yes and no of every label."""
        there = set(self._labels_of(row))
        applies = [float(label in there) for label in self.labels or ()]
        return tuple(share for yes in applies for share in (yes, 1 - yes))

    @property
    def is_undecided(self) -> bool:
        """Whether nobody has said the thresholds."""
        return self.thresholds is None

    def decided_by(self, examples: Sequence[Example], outputs: ModelOutputs) -> Self:
        """With the threshold of each label that has the best F1 on these rows."""
        kind = self.answer_kind
        right = np.array([example.shares[::2] for example in examples], dtype=bool)
        found = chosen_thresholds(right, kind.applying(outputs))
        task = copy.copy(self)
        task.thresholds = {
            label: round(value, 6)
            for label, value in zip(kind.options, found.tolist(), strict=True)
        }
        return task

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """See `SeveralLabels.metrics`."""
        return self.answer_kind.metrics(targets, predictions)

    def _labels_of(self, row: Mapping[str, Any]) -> list[str]:
        """The labels of a row; none where the cell says so, or nothing."""
        cell = cell_value(row[self.label_column])
        if isinstance(cell, list):
            return [label for label in map(label_text, cell) if label]
        if self._says_none(row):
            return []
        parts = (
            cell_text(cell).split(self.separator) if isinstance(cell, str) else [label_text(cell)]
        )
        return [label for label in (part.strip() for part in parts) if label]

    def _says_none(self, row: Mapping[str, Any]) -> bool:
        return cell_text(row[self.label_column]).strip().lower() == NONE

    def _check_thresholds(self) -> None:
        """Refuse thresholds that are no probabilities, or of labels that are not there."""
        given = self.thresholds
        if given is None:
            return
        values = given if isinstance(given, Mapping) else {"": given}
        for label, value in values.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not 0 <= value <= 1:
                raise ArgumentError(f"thresholds must be numbers from 0 to 1, not {value!r}.")
            if label and self.labels is not None and label not in self.labels:
                raise ArgumentError(
                    f"thresholds names the label {label!r}, which is none of "
                    f"{', '.join(map(repr, self.labels))}."
                )


def _checked(labels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(labels, str | bytes) or not isinstance(labels, Sequence):
        raise ArgumentError(f"labels must be a list of labels, not {str(labels)[:80]!r}.")
    texts = tuple(map(label_text, labels))
    for text in texts:
        if not text or ";" in text or text.lower() == NONE:
            raise ArgumentError(
                f"labels: {text!r} cannot be one of several labels: it must be a text without ';', "
                f"and not {NONE!r}."
            )
    if not texts or len(set(texts)) < len(texts):
        raise ArgumentError(f"labels must be one label or more, none twice: {list(texts)}.")
    return texts
