"""Rows whose label a model confidently disagrees with: a label error is one explanation.

Source: Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels",
JAIR 70 (2021), https://arxiv.org/abs/1911.00068
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


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
    place = {label: column for column, label in enumerate(labels)}
    own = np.array([place[label] for label in given], dtype=int)
    thresholds = np.full(len(labels), np.inf)
    for column in range(len(labels)):
        carriers = own == column
        if carriers.any():
            thresholds[column] = probabilities[carriers, column].mean()
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    suggested = confident.argmax(axis=1) if len(labels) else own
    rows = np.arange(len(own))
    suspected = (confident[rows, suggested] >= 0) & (
        probabilities[rows, suggested] > probabilities[rows, own]
    )
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
