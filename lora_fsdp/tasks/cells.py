"""Cells of a table as texts, lists and objects, whatever kind of file they come from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd


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
