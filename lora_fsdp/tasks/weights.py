"""How much each training row counts: by a column of the table, by its label, or both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from lora_fsdp.errors import (
    ArgumentError,
    ColumnNotFoundError,
    MalformedRowError,
    NoRowsError,
    UnknownLabelError,
    did_you_mean,
)
from lora_fsdp.tasks.base import Task
from lora_fsdp.tasks.cells import cell_text, first_faults, nearest_columns
from lora_fsdp.tasks.example import Example

BALANCED = "balanced"


def bad_weights(table: pd.DataFrame, column: str) -> pd.Series:
    """What is wrong with the weight of each row that has none, under its index in `table`.

    Raises:
        ColumnNotFoundError: there is no such column.
    """
    if column not in table.columns:
        there = [str(name) for name in table.columns]
        hints = " ".join([*nearest_columns([column], there), "Name it with --weight_column."])
        raise ColumnNotFoundError(
            f"There is no column {column!r} with weights: the columns of the table are "
            f"{', '.join(map(repr, there))}. {hints}"
        )
    faults = [_fault(cell, column) or "" for cell in table[column]]
    found = pd.Series(faults, index=table.index, name="fault", dtype="str")
    return found[found != ""]


def check_weights(table: pd.DataFrame, column: str) -> None:
    """Refuse a column that is no column of weights.

    Raises:
        ColumnNotFoundError, MalformedRowError: it is missing, or names rows that have none.
    """
    bad = bad_weights(table, column)
    if len(bad) > 0:
        raise MalformedRowError(
            f"{len(bad)} of {len(table)} rows have no weight: {first_faults(bad)}. A weight is a "
            "number from 0; correct them, or leave them out with --on_bad_rows drop."
        )


def weighted(
    task: Task,
    examples: Sequence[Example],
    table: pd.DataFrame,
    *,
    column: str | None,
    classes: Sequence[str] | None,
) -> list[Example]:
    """The examples with their weights, without those that weigh nothing.

    Args:
        task: bound to its table.
        examples: of the rows of `table`, in order.
        table: the training rows, whose weights are checked.
        column: with a weight for each row (`--weight_column`).
        classes: "balanced", or "label=weight" each (`--class_weights`). A label that is not named
            weighs 1.

    Raises:
        NoRowsError: every row weighs nothing.
        ArgumentError, UnknownLabelError: the weights of labels are none.
    """
    if column is None and not classes:
        return list(examples)
    of_row = [1.0] * len(examples) if column is None else list(map(_number, table[column]))
    labels = [task.answer_of(example) for example in examples]
    of_label = _class_weights(task, labels, classes) if classes else {}
    weights = [
        weight * of_label.get(label, 1.0) for weight, label in zip(of_row, labels, strict=True)
    ]
    kept = [
        replace(example, weight=weight)
        for example, weight in zip(examples, weights, strict=True)
        if weight > 0
    ]
    if examples and not kept:
        named = " and ".join(
            name
            for name, given in ((f"--weight_column {column}", column), ("--class_weights", classes))
            if given
        )  # fmt: skip
        raise NoRowsError(f"The weights of all {len(examples)} training rows are 0: see {named}.")
    return kept


def _class_weights(
    task: Task, labels: Sequence[str], classes: Sequence[str]
) -> Mapping[str, float]:
    known = list(task.answer_kind.labels)
    classes = [classes] if isinstance(classes, str) else classes
    if not known:
        raise ArgumentError(
            f"--class_weights weighs labels, and the answers of task {task.name!r} are no label of "
            "a set that all rows share: use --weight_column."
        )
    if list(classes) == [BALANCED]:
        # As scikit-learn's "balanced": every label's rows weigh as much together.
        counts = Counter(labels)
        return {label: len(labels) / (len(counts) * count) for label, count in counts.items()}
    weights: dict[str, float] = {}
    for given in classes:
        label, equals, text = given.rpartition("=")
        weight = _number(text)
        if not equals or not math.isfinite(weight) or weight < 0:
            raise ArgumentError(
                f"--class_weights {given!r}: give {BALANCED}, or label=weight for each label with "
                "a number from 0 (negative=1 positive=2)."
            )
        if label not in known:
            raise UnknownLabelError(
                f"--class_weights names the label {label!r}, which task {task.name!r} does not "
                f"have.{did_you_mean(label, known)} Its labels: {', '.join(map(repr, known))}."
            )
        if label in weights:
            raise ArgumentError(f"--class_weights names the label {label!r} twice.")
        weights[label] = weight
    return weights


def _fault(cell: object, column: str) -> str | None:
    if not cell_text(cell).strip():
        return f"nothing in column {column!r}"
    weight = _number(cell)
    if math.isfinite(weight) and weight >= 0:
        return None
    return f"column {column!r} holds {cell_text(cell)[:40]!r}, no weight"


def _number(cell: object) -> float:
    """A cell as a number; NaN where it is none."""
    try:
        return float(cell_text(cell))
    except ValueError:
        return math.nan
