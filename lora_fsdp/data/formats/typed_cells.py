"""The cells of an Arrow table (Parquet, `datasets`) as Python values, each as its column has it.

pandas would make numbers beside missing values floats, and so 2 to 2.0 and 10^17 + 1 to 1e+17.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa


def typed_columns(table: pa.Table) -> dict[str, list[Any]]:
    """The columns by name, with `None` for missing values and names for `ClassLabel` numbers."""
    features = _features(table.schema.metadata)
    return {
        field.name: _cells(column, field.type, features.get(field.name))
        for field, column in zip(table.schema, table.columns, strict=True)
    }


def _cells(column: pa.ChunkedArray, kind: pa.DataType, feature: object) -> list[Any]:
    values: list[Any] = column.to_pylist()
    if _holds_short_floats(kind):
        values = [_shortest(value, kind) for value in values]
    if "ClassLabel" in str(feature):
        values = [_named(value, feature) for value in values]
    return values


def _holds_short_floats(kind: pa.DataType) -> bool:
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    return kind in (pa.float16(), pa.float32()) or any(map(_holds_short_floats, inner))


def _shortest(value: Any, kind: pa.DataType) -> Any:
    """Short floats by their shortest decimal: 0.1 and not 0.10000000149011612."""
    if value is None:
        return None
    if kind in (pa.float16(), pa.float32()):
        short = np.float16 if kind == pa.float16() else np.float32
        return float(str(short(value)))
    if pa.types.is_struct(kind):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and kind.num_fields == 1 and not pa.types.is_map(kind):
        return [_shortest(entry, kind.field(0).type) for entry in value]
    return value


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What `datasets` writes about the columns into a schema's metadata; empty if nothing."""
    try:
        found = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):  # another program's, under the same key
        return {}
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _named(value: Any, feature: Any) -> Any:
    """`value` with the names of its classes; -1 stands for "no label" and becomes `None`."""
    if isinstance(feature, list) and len(feature) == 1:  # how older versions write a list
        feature = {"feature": feature[0]}
    if value is None or not isinstance(feature, dict):
        return value
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        if not isinstance(names, list) or not isinstance(value, int):
            return value
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, list):
        return [_named(entry, feature.get("feature")) for entry in value]
    if isinstance(value, dict):
        return {key: _named(entry, feature.get(key)) for key, entry in value.items()}
    return value
