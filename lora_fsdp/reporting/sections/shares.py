"""Answers that are distributions: how near they are to the rows' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.evaluation.verdict import columns_after
from lora_fsdp.reporting.texts import one_line
from lora_fsdp.tasks.answers.distribution import SHARE_OF
from lora_fsdp.tasks.answers.kind import PROBABILITY_OF

_FARTHEST = 10


def shares_section(predictions: pd.DataFrame) -> dict[str, Any]:
    """Average shares beside average probabilities, and the rows farthest off, JSON-ready."""
    named = columns_after(SHARE_OF, predictions)
    shares = predictions[list(named.values())].astype(float).to_numpy()
    given = predictions[[f"{PROBABILITY_OF}{label}" for label in named]].to_numpy(dtype=float)
    overlap = np.minimum(shares, given).sum(axis=1)
    labels = [one_line(label, limit=80) for label in named]
    return {
        "rows": len(predictions),
        "undecided": int((shares.max(axis=1) < 1).sum()),
        "by_label": [
            {"label": label, "share": float(share), "probability": float(probability)}
            for label, share, probability in zip(
                labels, shares.mean(axis=0), given.mean(axis=0), strict=True
            )
        ],
        "farthest": [
            {
                "row": int(predictions["row"].iloc[place]),
                "text": one_line(predictions["text"].iloc[place], limit=200),
                "overlap": float(overlap[place]),
                "shares": _listed(labels, shares[place]),
                "probabilities": _listed(labels, given[place]),
            }
            for place in np.argsort(overlap, kind="stable")[:_FARTHEST]
        ],
    }


def _listed(labels: list[str], numbers: np.ndarray) -> str:
    """The three largest, with their labels."""
    largest = np.argsort(-numbers, kind="stable")[:3]
    return ", ".join(f"{labels[place]} {numbers[place]:.2f}" for place in largest)
