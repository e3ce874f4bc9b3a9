"""Whether a model's probabilities mean what they say."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from lora_fsdp.evaluation.intervals import wilson_interval

BINS = 10
LEVELS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_SIMULATIONS = 500


def calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Confidence against accuracy in ten bins of equal width, and the expected calibration error.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    https://arxiv.org/abs/1706.04599

    Args:
        confidence: [N] probability of the answer given, 0 to 1.
        right: [N] bool, whether that answer is right.

    Returns:
        `error`: the mean over rows of |accuracy - confidence| of their bin; `confidence` and
        `accuracy` over all rows, the latter with its Wilson interval; `bins`: those that
        hold rows, each with its bounds; `error_expected` and `error_high`: mean and 95th percentile
        of the error that a calibrated model with these probabilities has on as many rows.
    """
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = []
    for place in range(BINS):
        chosen = places == place
        if chosen.any():
            bins.append(
                {
                    "from": place / BINS,
                    "to": (place + 1) / BINS,
                    "rows": int(chosen.sum()),
                    "confidence": float(confidence[chosen].mean()),
                    "accuracy": float(right[chosen].mean()),
                }
            )
    expected, high = _error_by_chance(confidence, places)
    gaps = sum(one["rows"] * abs(one["accuracy"] - one["confidence"]) for one in bins)
    accuracy = wilson_interval(int(right.sum()), len(right))
    return {
        "error": gaps / len(confidence),
        "error_expected": expected,
        "error_high": high,
        "confidence": float(confidence.mean()),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "rows": len(confidence),
        "bins": bins,
    }


def answered_and_right(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Which share of the rows is answered from a probability on, and how many of these rightly.

    Args:
        confidence, right: as for `calibration`.

    Returns:
        a line for each level that leaves out more rows than the one before it: `level`, `rows`,
        `share` of all rows, `accuracy` of these; both with their Wilson intervals.
    """
    lines: list[dict[str, Any]] = []
    for level in LEVELS:
        chosen = confidence >= level
        rows = int(chosen.sum())
        if rows == 0 or (lines and rows == lines[-1]["rows"]):
            continue
        share = wilson_interval(rows, len(confidence))
        accuracy = wilson_interval(int(right[chosen].sum()), rows)
        line = {"level": level, "rows": rows, "share": asdict(share), "accuracy": asdict(accuracy)}
        lines.append(line)
    return lines


def _error_by_chance(confidence: np.ndarray, places: np.ndarray) -> tuple[float, float]:
    """Mean and 95th percentile of the error where each answer is right as often as it says.

    Of few rows even such a model has an error: a bin's accuracy is a mean of few zeros and ones.
    Source: Bröcker and Smith, "Increasing the Reliability of Reliability Diagrams", Weather and
    Forecasting 22 (2007), who draw the answers anew from the probabilities likewise.
    """
    random = np.random.default_rng(0)
    bins = (places[:, None] == np.arange(BINS)).astype(float)
    sums = confidence @ bins
    errors = [
        np.abs((random.random(len(confidence)) < confidence) @ bins - sums).sum() / len(confidence)
        for _ in range(_SIMULATIONS)
    ]
    return float(np.mean(errors)), float(np.percentile(errors, 95))
