"""Cells of a table as texts, lists and objects, whatever file they come from; its rows; faults."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

_ROWS_SHOWN = 5


class WrittenFloat(float):
    """A decimal of a JSON text that is written again as it stood there (2.50, 1e5)."""

    def __new__(cls, text: str | float) -> WrittenFloat:
        """The number that `text` spells."""
        number = super().__new__(cls, text)
        number.text = str(text)
        return number

    text: str

    def __repr__(self) -> str:
        return self.text


def parse_json(text: str) -> Any:
    """`json.loads`, of which each decimal remembers how it was written."""
    return json.loads(text, parse_float=WrittenFloat)


def cell_text(value: object) -> str:
    """A cell as text: a missing value is "", a list or an object is JSON, bytes are UTF-8."""
    if isinstance(value, str):
        return value
    value = plain(value)
    if isinstance(value, dict | list):
        return json_text(value)
    return "" if value is None else str(value)


def label_text(value: object) -> str:
    """A label as text: stripped, 1 and 1.0 both "1", and a missing value ""."""
    if isinstance(value, float | np.floating) and value.is_integer():
        return str(int(value))
    return cell_text(value).strip()


def text_fault(value: object) -> str | None:
    """Why a cell is no text, or `None`."""
    if isinstance(value, bytes | bytearray | np.bytes_):
        try:
            bytes(value).decode()
        except UnicodeDecodeError:
            return f"bytes that are not UTF-8: {bytes(value)[:20]!r}"
    return None


def label_fault(value: object) -> str | None:
    """Why a cell is no label, or `None`: a label is one text, number, date or truth value."""
    value = plain(value)
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind}, not one label: {json_text(value)[:80]}"
    return text_fault(value)


def json_text(value: object) -> str:
    """`value` as JSON in one line, with each number as it was written."""
    value = plain(value)
    if isinstance(value, dict):
        entries = [f"{json_text(key)}: {json_text(entry)}" for key, entry in value.items()]
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(json_text, value))}]"
    if isinstance(value, WrittenFloat | Decimal):
        return str(value)
    known = value is None or isinstance(value, bool | int | float)
    return json.dumps(value if known else cell_text(value), ensure_ascii=False)


def cell_value(value: object) -> Any:
    """What a nested cell holds: JSON text (all that CSV has) parsed, Parquet's arrays as lists.

    Text that is no JSON is returned as it is, and a missing value as `None`.
    """
    if isinstance(value, str):
        try:
            parsed = parse_json(value)
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
    if isinstance(value, bytes | bytearray):  # what older writers of Parquet make of texts
        return bytes(value).decode() if text_fault(value) is None else bytes(value)
    if isinstance(value, np.floating):
        return None if np.isnan(value) else float(str(value))  # 0.1 of 32 bits stays 0.1
    if isinstance(value, np.datetime64):  # whose item() may be a bare number
        return plain(pd.Timestamp(value))
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
