"""Labels that are right in part: votes of several people, or probabilities."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pandas as pd

from lora_fsdp.errors import ArgumentError, SingleLabelError
from lora_fsdp.tasks.answers.distribution import Distribution
from lora_fsdp.tasks.answers.kind import PROBABILITY_OF
from lora_fsdp.tasks.cells import cell_text, cell_value, label_text, records
from lora_fsdp.tasks.columns import ColumnTask
from lora_fsdp.tasks.rating import number_of
from lora_fsdp.tasks.registry import register_task

_VOTES_FOR = "votes/"
# How far from 1 the sum of probabilities may be that were rounded.
_ROUNDING = 0.01 + 1e-9


@register_task
class SoftClassificationTask(ColumnTask):
    """A probability for each label of a text, learnt from the rows' shares of them.

    The shares stand in a column for each label, called `probability/<label>` (as predictions of
    this library have them) or `votes/<label>`, or as `share_columns` names them; or in one column,
    as an object of labels and numbers, or as a list with a label for each vote.

    Attributes:
        share_columns: a column for each label; the label is what follows `probability/` or
            `votes/`, or the whole name.
        votes: whether the numbers are votes, of any sum; otherwise they are probabilities, whose
            sum is 1.
        labels: the label set; `None` = those of the columns, or those that occur, sorted.
    """

    name = "soft_classification"
    description = "A probability for each label of a text, from votes or probabilities"
    primary_metric = "overlap"

    instruction = (
        "Classify the following text. Output exactly one label, with no punctuation or extra text:"
    )
    text_column = "text"
    label_column = "votes"
    share_columns: Sequence[str] | None = None
    votes: bool | None = None
    labels: Sequence[str] | None = None

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        labels: Sequence[str] | None = None,
        share_columns: Sequence[str] | None = None,
        votes: bool | None = None,
    ) -> None:
        super().__init__(
            instruction=instruction, text_column=text_column, label_column=label_column
        )
        if not isinstance(votes, bool | None):
            raise ArgumentError(f"votes must be true or false, not {votes!r}.")
        self.votes = votes
        if share_columns is not None:
            self.share_columns = _distinct("share_columns", share_columns)
        if labels is not None:
            self.labels = _distinct("labels", [label_text(one) for one in _listed(labels)])
        if self.share_columns is not None:
            named = tuple(map(_label_of, self.share_columns))
            if self.labels is not None and tuple(self.labels) != named:
                raise ArgumentError(
                    f"labels {list(self.labels)} are not those of share_columns, {list(named)}: "
                    "leave labels out."
                )
            self.labels = _distinct("share_columns", named)

    @property
    def answer_kind(self) -> Distribution:
        """A distribution over the labels."""
        return Distribution(self.labels or (), self.target_of)

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Self:
        """A copy with columns and labels settled, after every row has been checked.

        Raises:
            NoRowsError, ColumnNotFoundError, MalformedRowError: the table does not fit.
            SingleLabelError: there are not two labels.
        """
        task = self._settled(table) if with_labels else self
        bind = super(SoftClassificationTask, task).bind
        return bind(table, with_labels=with_labels, for_training=for_training)

    def settled_by(self, table: pd.DataFrame) -> Self:
        """A copy with the labels that the rows name, if nobody has named them."""
        if self.labels is not None:
            return self
        task = copy.copy(self)
        found = {label for row in records(table) for label in task._numbers(row)}
        if len(found) < 2:
            raise SingleLabelError(
                f"Column {task.label_column!r} names {len(found)} label: a distribution needs two "
                "or more."
            )
        task.labels = tuple(sorted(found))
        return task

    def bad_rows(self, table: pd.DataFrame, *, with_labels: bool = True) -> pd.Series:
        """As in the base class, with the columns of the shares settled."""
        task = self._settled(table) if with_labels else self
        return super(SoftClassificationTask, task).bad_rows(table, with_labels=with_labels)

    def answer_columns(self) -> Sequence[str]:
        """Those of the shares."""
        return (self.label_column,) if self.share_columns is None else self.share_columns

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """No text, or numbers that are no distribution."""
        if not cell_text(row[self.text_column]).strip():
            return f"nothing in column {self.text_column!r}"
        if not with_labels:
            return None
        if self.share_columns is not None:
            return self._fault_of(row, f"columns {', '.join(map(repr, self.share_columns))}")
        cell, column = cell_value(row[self.label_column]), f"column {self.label_column!r}"
        if cell is None or cell in ("", [], {}):
            return f"nothing in {column}"
        if not isinstance(cell, dict | list):
            return (
                f"{column} holds {cell_text(cell)[:80]!r}, neither a list of votes nor an object "
                "of labels and numbers"
            )
        if isinstance(cell, list) and not all(map(label_text, cell)):
            return f"{column} has a vote for nothing: {cell_text(cell)[:80]}"
        return self._fault_of(row, column)

    def _fault_of(self, row: Mapping[str, Any], place: str) -> str | None:
        numbers = self._numbers(row)
        for label, number in numbers.items():
            if number is None or number < 0:
                cell = self._cells(row)[label]
                return f"{place}: {label!r} has {cell_text(cell)[:40]!r}, no number from 0"
        known = numbers if self.labels is None else self.labels
        if unknown := [label for label in numbers if label not in known]:
            return f"{place}: {unknown[0]!r} is none of {', '.join(map(repr, known))}"
        total = sum(number for number in numbers.values() if number is not None)
        if total <= 0:
            return f"{place}: all numbers are 0"
        if not self._are_votes(row) and abs(total - 1) > _ROUNDING:
            return f"{place}: the probabilities sum to {total:.6g}, and not to 1"
        return None

    def build_shares(self, row: Mapping[str, Any]) -> tuple[float, ...]:
        """Each label's part of the whole."""
        numbers = self._numbers(row)
        given = [numbers.get(label) or 0.0 for label in self.labels or ()]
        return tuple(number / sum(given) for number in given)

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The label with the largest share; of several as large the first."""
        shares = self.build_shares(row)
        return self.target_of((self.labels or ())[shares.index(max(shares))])

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """See `Distribution.metrics`."""
        return self.answer_kind.metrics(targets, predictions)

    def _settled(self, table: pd.DataFrame) -> Self:
        """A copy that reads the columns which the table has."""
        if self.share_columns is not None or self.label_column in table.columns:
            return self
        task = copy.copy(self)
        for prefix in (PROBABILITY_OF, _VOTES_FOR):
            there = [str(name) for name in table.columns if str(name).startswith(prefix)]
            if len(there) > 1:
                task.share_columns = there
                task.votes = prefix == _VOTES_FOR if task.votes is None else task.votes
                named = tuple(map(_label_of, there))
                if task.labels is not None and set(named) != set(task.labels):
                    raise ArgumentError(
                        f"The columns {prefix}... are of the labels {list(named)}, and not of "
                        f"{list(task.labels)}: change --labels or the columns."
                    )
                task.labels = named if task.labels is None else task.labels
                return task
        return task

    def _are_votes(self, row: Mapping[str, Any]) -> bool:
        if self.share_columns is None and isinstance(cell_value(row[self.label_column]), list):
            return True
        return bool(self.votes)

    def _cells(self, row: Mapping[str, Any]) -> Mapping[str, object]:
        """What the row says of each label that it names."""
        if self.share_columns is not None:
            return {_label_of(column): row[column] for column in self.share_columns}
        cell = cell_value(row[self.label_column])
        if isinstance(cell, list):
            labels = list(map(label_text, cell))
            return {label: labels.count(label) for label in labels}
        # Parquet has all keys in every object.
        given = cell.items() if isinstance(cell, dict) else ()
        return {label_text(label): number for label, number in given if number is not None}

    def _numbers(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        return {label: number_of(cell) for label, cell in self._cells(row).items()}


def _label_of(column: str) -> str:
    for prefix in (PROBABILITY_OF, _VOTES_FOR):
        if column.startswith(prefix):
            return column.removeprefix(prefix)
    return column


def _listed(given: object) -> list[Any]:
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []


def _distinct(name: str, given: object) -> tuple[str, ...]:
    texts = _listed(given)
    usable = all(isinstance(text, str) and text.strip() for text in texts)
    if len(texts) < 2 or not usable or len(set(texts)) < len(texts):
        raise ArgumentError(f"{name} must be a list of two or more, none twice, not {given!r}.")
    return tuple(texts)
