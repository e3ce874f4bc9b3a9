"""Rows that may be labelled wrongly, by adapters that have not learnt from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lora_fsdp.evaluation.comparison import write_predictions
from lora_fsdp.reporting.recording.label_errors import suspected_label_errors
from lora_fsdp.sweeps.earlier import LABEL_ERRORS_FILE
from lora_fsdp.tasks.answers.kind import PROBABILITY_OF


def label_errors(pooled: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """The rows whose label the adapters confidently disagree with, the strongest first.

    Args:
        pooled: all N rows as `out_of_fold.csv` has them, with a column for each label's
            probability.
        labels: the label set.

    Returns:
        `row` (its number in the user's file), `given_label`, `suggested_label`, `probability` (of
        the suggested one), `probability_of_given`, `fold`, `text`.
    """
    probabilities = pooled[[f"{PROBABILITY_OF}{label}" for label in labels]].to_numpy(float)
    found = suspected_label_errors(pooled["target"].tolist(), probabilities, labels)
    rows = pooled.iloc[found["position"].to_numpy()].reset_index(drop=True)
    return pd.DataFrame(
        {
            "row": rows["row"],
            "given_label": found["given"],
            "suggested_label": found["suggested"],
            "probability": found["probability_suggested"],
            "probability_of_given": found["probability_given"],
            "fold": rows["fold"],
            "text": rows["text"],
        }
    )


def write_label_errors(
    pooled: pd.DataFrame | None, labels: Sequence[str], root: Path
) -> str | None:
    """Write `label_errors.csv`; returns a line about it, or `None` where there is nothing to say.

    Args:
        pooled: all rows, answered out of fold; `None` = there are no folds, or not of all rows.
        labels: the label set; where rows have no label of one, there is no file.
        root: the run's folder.
    """
    if pooled is None or not _has_labels(pooled, labels):
        return None
    found = label_errors(pooled, labels)
    write_predictions(found, root / LABEL_ERRORS_FILE)
    return (
        f"{len(found)} of {len(pooled)} rows may be labelled wrongly, by adapters that had not "
        f"learnt from them: {root / LABEL_ERRORS_FILE}"
    )


def _has_labels(pooled: pd.DataFrame, labels: Sequence[str]) -> bool:
    """Whether each row has one label of a set, and a probability for each."""
    columns = {f"{PROBABILITY_OF}{label}" for label in labels}
    return bool(labels) and columns <= set(pooled.columns) and pooled["target"].isin(labels).all()
