"""Answers of several labels: each label by itself, and the threshold that would suit it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.evaluation.verdict import columns_after
from lora_fsdp.reporting.texts import one_line
from lora_fsdp.tasks.answers.several_labels import APPLIES, best_thresholds, labels_in


def several_section(predictions: pd.DataFrame) -> dict[str, Any]:
    """Every label's scores, the one with the lowest F1 first, JSON-ready."""
    columns = columns_after(APPLIES, predictions)
    right, given = (
        np.array([[label in labels_in(answer) for label in columns] for answer in predictions[who]])
        for who in ("target", "tuned")
    )
    applying = predictions[list(columns.values())].astype(float).to_numpy()
    thresholds = best_thresholds(right, applying)
    lines = []
    for place, label in enumerate(columns):
        there, said, best = (
            right[:, place],
            given[:, place],
            applying[:, place] >= thresholds[place],
        )
        lines.append(
            {
                "label": one_line(label, limit=80),
                "rows": int(there.sum()),
                "precision": float((there & said).sum() / max(said.sum(), 1)),
                "recall": float((there & said).sum() / max(there.sum(), 1)),
                "f1": _f1(there, said),
                "threshold": float(thresholds[place]),
                "f1_at_threshold": _f1(there, best),
            }
        )
    return {
        "rows": len(predictions),
        "all_right": int((right == given).all(axis=1).sum()),
        "labels_a_row": float(right.sum(axis=1).mean()),
        "labels_given": float(given.sum(axis=1).mean()),
        "by_label": sorted(lines, key=lambda line: line["f1"]),
    }


def _f1(right: np.ndarray, given: np.ndarray) -> float:
    return float(2 * (right & given).sum() / max(right.sum() + given.sum(), 1))
