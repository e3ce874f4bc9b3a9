"""`X`, `y` and `sample_weight`, in the forms that scikit-learn hands on, as lists of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from lora_fsdp.errors import (
    ColumnNotFoundError,
    DataError,
    LabelCollisionError,
    SingleLabelError,
    UnknownLabelError,
)
from lora_fsdp.tasks.cells import label_text

_TEXT = "text"


def texts_of(X: Any, *, text_column: str | None) -> tuple[list[Any], str]:
    """The texts, and what their column is called.

    Args:
        X: N texts, in any form that scikit-learn takes them in.
        text_column: of a DataFrame with several columns.

    Raises:
        DataError: `X` holds no list of texts.
    """
    if isinstance(X, pd.DataFrame):
        return _texts_of_table(X, text_column)
    if isinstance(X, str | bytes | Mapping):
        raise DataError(f"X is a {type(X).__name__}: give a list of texts, one for each row.")
    if isinstance(X, pd.Series):
        return list(X), _TEXT
    if not isinstance(X, Sequence | np.ndarray) and not hasattr(X, "__array__"):
        raise DataError(f"X is a {type(X).__name__}: give a list, an array or a Series of texts.")
    cells: Any = X if isinstance(X, Sequence) else np.asarray(X)
    if isinstance(cells, np.ndarray) and cells.ndim == 2 and cells.shape[1] == 1:
        cells = cells[:, 0]
    if isinstance(cells, np.ndarray) and cells.ndim != 1:
        raise DataError(
            f"X has the shape {cells.shape}: give one text for each row, of shape (rows,) or "
            "(rows, 1)."
        )
    strange = next((n for n, cell in enumerate(cells, 1) if not _is_cell(cell)), None)
    if strange is not None:
        raise DataError(f"Row {strange} of X is {cells[strange - 1]!r:.80}, not a text.")
    return list(cells), _TEXT


def _texts_of_table(table: pd.DataFrame, named: str | None) -> tuple[list[Any], str]:
    columns = [str(name) for name in table.columns]
    if named is None and len(columns) == 1:
        named = columns[0]
    if named is None:
        raise ColumnNotFoundError(
            f"X has the columns {', '.join(map(repr, columns))}: name the one with the text by "
            "text_column."
        )
    if columns.count(named) != 1:
        raise ColumnNotFoundError(
            f"X has no single column {named!r}, but {', '.join(map(repr, columns))}: set "
            "text_column."
        )
    cells = list(table.iloc[:, columns.index(named)])
    strange = next((n for n, cell in enumerate(cells, 1) if not _is_cell(cell)), None)
    if strange is not None:
        raise DataError(
            f"Row {strange}, column {named!r} of X is {cells[strange - 1]!r:.80}, not a text."
        )
    return cells, named


def labels_of(y: Any, *, rows: int) -> tuple[list[Any], np.ndarray]:
    """The labels as a task reads them, and the sorted ones of the user's own type.

    Raises:
        DataError: there are as many labels as rows only in name, or one is missing.
    """
    if y is None:
        raise DataError(
            "requires y to be passed, but the target y is None: give a label for each row."
        )
    labels = column_or_1d(y, warn=True)
    if len(labels) != rows:
        raise DataError(f"X has {rows} rows and y {len(labels)}: give a label for each row.")
    missing = np.flatnonzero(pd.isna(labels)) + 1
    if len(missing):
        shown = ", ".join(map(str, missing[:5].tolist()))
        raise UnknownLabelError(f"{len(missing)} rows of y have no label: row {shown}.")
    if rows:
        check_classification_targets(labels)
    classes = np.unique(labels)
    texts = [label_text(one) for one in classes.tolist()]
    if len(classes) == 1:
        raise SingleLabelError(
            f"y has one class, {texts[0]!r}: there is nothing to learn. Give rows of at least two."
        )
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise LabelCollisionError(
            f"Different labels of y are written alike: {', '.join(map(repr, twice))}; rename one."
        )
    return [label_text(one) for one in labels.tolist()], classes


def weights_of(given: Any, *, rows: int) -> list[Any]:
    """A weight for each row.

    Raises:
        DataError: there are not as many as rows.
    """
    weights = np.asarray(given, dtype=object)
    if weights.ndim == 0:
        weights = np.full(rows, given, dtype=object)
    if weights.shape != (rows,):
        raise DataError(
            f"sample_weight has the shape {weights.shape}, and X {rows} rows: give a number for "
            "each row."
        )
    return list(weights)


def _is_cell(cell: object) -> bool:
    """Whether it may be a text: one, or nothing, which is refused with its row by the task."""
    return isinstance(cell, str) or cell is None or cell is pd.NA or cell != cell
