"""What one adapter of several came to, and the mean of several with its spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.evaluation.outputs import TUNED
from lora_fsdp.evaluation.verdict import score_text


def is_loss(metric: str) -> bool:
    """Whether the least is the best."""
    return metric == "loss"


@dataclass(frozen=True)
class MemberResult:
    """What one adapter came to.

    Attributes:
        name: of its folder.
        setting: number of its setting.
        values: what the grid sets.
        seed, fold: as in `Asked`.
        stopped: why it was stopped before its end; it has no scores then.
        metrics: of every system, as in `metrics.json`.
        predictions: row by row, as in `predictions.csv`.
        test: the tuned model's metrics on the test rows, if there are any.
        test_interval: of the deciding metric there, its lowest and highest (95 %) over other rows.
    """

    name: str
    setting: int
    values: Mapping[str, Any]
    seed: int
    fold: int | None
    stopped: str | None
    metrics: Mapping[str, Mapping[str, float]]
    predictions: pd.DataFrame | None
    test: Mapping[str, float] | None = None
    test_interval: tuple[float, float] | None = None

    def score(self, metric: str) -> float:
        """The tuned model's; NaN if it was stopped."""
        return float(self.metrics.get(TUNED, {}).get(metric, math.nan))


@dataclass(frozen=True)
class Spread:
    """A mean over adapters with its standard deviation.

    Attributes:
        mean: of those that were trained to their end.
        deviation: standard deviation over them (n - 1); NaN for a single one.
        count: how many there are.
    """

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of all `values` that are numbers."""
        known = np.array([value for value in values if not math.isnan(value)], dtype=float)
        mean = float(known.mean()) if len(known) else math.nan
        deviation = float(known.std(ddof=1)) if len(known) > 1 else math.nan
        return cls(mean, deviation, len(known))

    def __str__(self) -> str:
        if math.isnan(self.deviation):
            return score_text(self.mean)
        return f"{score_text(self.mean)} ± {score_text(self.deviation)}"
