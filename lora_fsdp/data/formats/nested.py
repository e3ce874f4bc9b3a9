"""Columns inside columns: `review.body` of a column `review` whose cells are objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

_DEEPEST = 6
#: Objects with keys of their own in each row are no columns.
_MOST_PATHS = 500


def with_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row with a further entry, by its dotted path, for each entry of its objects.

    A column whose own name is such a path keeps its cell.
    """
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            _add(found, str(name), value, depth=1)
    return {**found, **record} if found else dict(record)


def with_nested_columns(table: pd.DataFrame) -> pd.DataFrame:
    """A table with a further column for each path into its cells, after its own columns."""
    nested = [name for name in table.columns if _has_objects(table[name])]
    if not nested:
        return table
    rows = [with_paths(dict(zip(nested, row, strict=True)))
            for row in table[nested].itertuples(index=False)]  # fmt: skip
    own = set(table.columns)
    paths = dict.fromkeys(path for row in rows for path in row if path not in own)
    if len(paths) > _MOST_PATHS:
        return table
    added = {path: [row.get(path) for row in rows] for path in paths}
    return pd.concat([table, pd.DataFrame(added, index=table.index, dtype=object)], axis=1)


def _has_objects(column: pd.Series) -> bool:
    return column.dtype == object and any(isinstance(value, dict) for value in column)


def _add(found: dict[str, Any], path: str, value: Mapping[str, Any], *, depth: int) -> None:
    for key, entry in value.items():
        inner = f"{path}.{key}"
        found[inner] = entry
        if isinstance(entry, dict) and depth < _DEEPEST:
            _add(found, inner, entry, depth=depth + 1)
