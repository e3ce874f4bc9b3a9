"""Rows whose label a model confidently disagrees with: a label error is one explanation.

Source: Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels",
JAIR 70 (2021), https://arxiv.org/abs/1911.00068
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.reporting.texts import one_line

_SHOWN = 10


def suspected_label_errors(
    given: Sequence[str], probabilities: np.ndarray, labels: Sequence[str]
) -> pd.DataFrame:
    """The rows that confident learning counts as labelled otherwise than they are.

    A label's threshold is the mean probability that it has among the rows that carry it. A row is
    suspected if, of the labels whose probability reaches their threshold there, the likeliest is
    likelier than the one it carries.

    Args:
        given: the label that each of N rows carries.
        probabilities: [N, A], of each label; from a model that did not train on these rows.
        labels: the A labels, in the order of the columns.

    Returns:
        A line for each suspected row, the strongest disagreement first: `position` among the N
        rows, `given`, `suggested`, and the probabilities of both.
    """
    own = pd.Categorical(given, categories=list(labels)).codes.astype(int)
    of_carriers = [probabilities[own == column, column] for column in range(len(labels))]
    thresholds = np.array([some.mean() if len(some) else np.inf for some in of_carriers])
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    suggested = confident.argmax(axis=1) if len(labels) else own
    rows = np.arange(len(own))
    suspected = confident[rows, suggested] >= 0
    suspected &= probabilities[rows, suggested] > probabilities[rows, own]
    found = pd.DataFrame(
        {
            "position": rows[suspected],
            "given": [labels[i] for i in own[suspected]],
            "suggested": [labels[i] for i in suggested[suspected]],
            "probability_given": probabilities[rows, own][suspected],
            "probability_suggested": probabilities[rows, suggested][suspected],
        }
    )
    margin = found["probability_suggested"] - found["probability_given"]
    order = margin.sort_values(ascending=False, kind="stable").index
    return found.loc[order].reset_index(drop=True)


def listed_suspects(
    rows: pd.DataFrame,
    suspects: pd.DataFrame,
    listed: Callable[[pd.DataFrame], list[dict[str, Any]]],
) -> dict[str, Any]:
    """How many of `rows` are suspected, and the first as `listed` shows rows; JSON-ready."""
    first = suspects.head(_SHOWN)
    lines = listed(rows.iloc[first["position"].to_numpy()])
    for line, suspect in zip(lines, first.itertuples(index=False), strict=True):
        line |= {
            "suggested": one_line(suspect.suggested, limit=80),
            "probability_suggested": float(suspect.probability_suggested),
            "probability_given": float(suspect.probability_given),
        }
    return {"examined": len(rows), "count": len(suspects), "first": lines}
