"""Answers that are numbers: how far off they are, and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.reporting.texts import one_line

_MOST_BANDS, _WORST = 12, 10


def numbers_section(predictions: pd.DataFrame) -> dict[str, Any]:
    """How far the answers are from the right numbers, JSON-ready."""
    right = predictions["target"].astype(float)
    given = predictions["tuned"].astype(float)
    errors = (given - right).abs()
    worst = errors.sort_values(ascending=False, kind="stable").index[:_WORST]
    return {
        "rows": len(predictions),
        "exact": int((errors == 0).sum()),
        "median_error": float(errors.median()),
        "bands": _bands(right, given),
        "worst": [
            {
                "row": int(predictions["row"][place]),
                "text": one_line(predictions["text"][place], limit=200),
                "target": one_line(predictions["target"][place], limit=40),
                "tuned": one_line(predictions["tuned"][place], limit=40),
                "error": float(errors[place]),
            }
            for place in worst
            if errors[place] > 0
        ],
    }


def _bands(right: pd.Series, given: pd.Series) -> list[dict[str, Any]]:
    """The rows by their right number; where there are many numbers, by tenths of the rows."""
    groups = right
    if right.nunique() > _MOST_BANDS:
        groups = pd.Series(pd.qcut(right, 10, duplicates="drop", labels=False), right.index)
    found = []
    for _, places in sorted(groups.groupby(groups).groups.items()):
        low, high = right[places].min(), right[places].max()
        found.append(
            {
                "from": float(low),
                "to": float(high),
                "rows": len(places),
                "mean_answer": float(given[places].mean()),
                "mean_error": float(np.abs(given[places] - right[places]).mean()),
            }
        )
    return found
