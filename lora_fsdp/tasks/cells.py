"""Cells of a table as texts, lists and objects, whatever file they come from; its rows; faults."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

_ROWS_SHOWN = 5


def cell_text(value: object) -> str:
    """A cell as text; a missing value is ""."""
    return "" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


def cell_value(value: object) -> Any:
    """What a nested cell holds: JSON text (all that CSV has) parsed, Parquet's arrays as lists.

    Text that is no JSON is returned as it is, and a missing value as `None`.
    """
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        # A number or a word in quotes is the text that it is.
        return parsed if isinstance(parsed, list | dict) else value
    return plain(value)


def plain(value: object) -> Any:
    """`value` with lists and dictionaries instead of arrays, all the way down."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def records(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The rows of a table, each by its columns' names."""
    columns = [str(column) for column in table.columns]
    for values in table.itertuples(index=False):
        yield dict(zip(columns, values, strict=True))


def first_faults(faults: pd.Series) -> str:
    """The first of what `Task.bad_rows` returns, for a message."""
    shown = [f"row {number} ({fault})" for number, fault in faults[:_ROWS_SHOWN].items()]
    return ", ".join([*shown, "…"] if len(faults) > len(shown) else shown)


def nearest_columns(missing: Sequence[str], there: Sequence[str]) -> list[str]:
    """For each missing column that resembles one of the table, the question whether it is meant."""
    nearest = {name: difflib.get_close_matches(name, there, n=1) for name in missing}
    return [f"Did you mean {near[0]!r} for {name!r}?" for name, near in nearest.items() if near]
