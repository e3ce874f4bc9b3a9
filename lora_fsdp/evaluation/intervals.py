"""How far scores on a few rows can be trusted: intervals and paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

CONFIDENCE = 0.95
DRAWS = 2_000
# Metrics that are the share of right answers, and those of one label, as "<metric>/<label>".
SHARES = ("accuracy", "exact_match")
_OF_A_LABEL = ("precision", "recall", "f1")


@dataclass(frozen=True, slots=True)
class Interval:
    """A score and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, rows: int) -> Interval:
    """A share and its Wilson score interval.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
    JASA 22 (1927).
    """
    # Imported here, because scipy.stats takes half a second to import.
    from scipy.stats import binomtest

    interval = binomtest(successes, rows).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(successes / rows, float(interval.low), float(interval.high))


def mcnemar_p_value(first_right: np.ndarray, second_right: np.ndarray) -> float:
    """Exact two-sided McNemar test: are two systems right on equally many of the same rows?

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions",
    Psychometrika 12 (1947), in its exact, binomial form.

    Args:
        first_right, second_right: [N] bool, whether each system is right on each row.
    """
    from scipy.stats import binomtest

    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


class PairedBootstrap:
    """Scores of several systems on the same resampled rows.

    Rows are drawn with replacement, 2,000 times, with a fixed seed. What a row contributes depends
    on its target, answers and scores only, so rows that agree in all of them are drawn together, by
    their number. Intervals are the 2.5th and 97.5th percentiles.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; Koehn,
    "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004 (paired).

    Args:
        targets: the N right answers.
        answers: for each system its N answers.
        labels: the label set; macro-F1 is the mean over those that occur. Empty if it is not asked
            for.
        scores: by (system, metric) N scores of which the metric is the mean.
        weights: by (system, metric) how much each of these scores counts, where not all alike.
    """

    def __init__(
        self,
        targets: Sequence[str],
        answers: Mapping[str, Sequence[str]],
        *,
        labels: Sequence[str] = (),
        scores: Mapping[tuple[str, str], Sequence[float]] | None = None,
        weights: Mapping[tuple[str, str], Sequence[float]] | None = None,
        seed: int = 0,
    ) -> None:
        columns: dict[Any, list[Any]] = {"target": list(targets)}
        columns |= {f"answer {name}": list(given) for name, given in answers.items()}
        columns |= {key: list(given) for key, given in (scores or {}).items()}
        columns |= {(*key, "weight"): list(given) for key, given in (weights or {}).items()}
        kinds = pd.DataFrame(columns, dtype=object).value_counts(sort=False)
        self.rows = len(targets)
        self.labels = list(labels)
        self._kinds = kinds.index.to_frame(index=False)
        counts = kinds.to_numpy()
        drawn = np.random.default_rng(seed).multinomial(self.rows, counts / self.rows, size=DRAWS)
        # The rows as they are come first, the resampled ones after them.
        self._weights = np.vstack([counts, drawn]).astype(float)

    def knows(self, system: str, metric: str) -> bool:
        """Whether there are the system's `scores` by the metric, or answers that give it."""
        if (system, metric) in self._kinds:
            return True
        kind, _, label = metric.partition("/")
        if f"answer {system}" not in self._kinds:
            return False
        means = metric in ("macro_f1", "weighted_f1") and len(self.labels) > 0
        return metric in SHARES or means or (kind in _OF_A_LABEL and label in self.labels)

    def interval(self, system: str, metric: str) -> Interval:
        """A system's score by a metric that it `knows`."""
        return _interval(self.scores(system, metric))

    def difference(self, first: str, second: str, metric: str, *, of: int = 1) -> Interval:
        """By how much `first` scores above `second` on the same rows.

        Args:
            first, second: systems.
            metric: one that both `know`.
            of: how many such differences are looked at; with 95 % confidence all their intervals
                hold (Bonferroni).
        """
        return _interval(self.scores(first, metric) - self.scores(second, metric), of=of)

    def scores(self, system: str, metric: str) -> np.ndarray:
        """[1 + draws] a score that is `known`: of the rows as they are, then of each sample."""
        if (system, metric) in self._kinds:
            return self._mean_scores(system, metric)
        targets, answers = self._kinds["target"], self._kinds[f"answer {system}"]
        right = (targets == answers).to_numpy()
        if metric in SHARES:
            return self._weights @ right / self.rows
        true = _one_hot(targets, self.labels)
        hits = self._weights @ (true * right[:, None])
        carried, given = self._weights @ true, self._weights @ _one_hot(answers, self.labels)
        kind, _, label = metric.partition("/")
        if kind in _OF_A_LABEL:
            place = self.labels.index(label)
            whole = {"recall": carried, "precision": given, "f1": (carried + given) / 2}[kind]
            return _shares(hits[:, place], whole[:, place])
        f1 = _shares(2 * hits, carried + given)
        if metric == "weighted_f1":
            return _shares((f1 * carried).sum(axis=1), carried.sum(axis=1))
        # A label that is neither a target nor an answer is left out of the mean, of all rows as of
        # each sample: as in the task's own metric, and as 0 it would bias it downwards.
        return f1.sum(axis=1) / np.maximum((carried + given > 0).sum(axis=1), 1)

    def _mean_scores(self, system: str, metric: str) -> np.ndarray:
        scores = self._kinds[system, metric].to_numpy(dtype=float)
        if (system, metric, "weight") not in self._kinds:
            return self._weights @ scores / self.rows
        counted = self._kinds[system, metric, "weight"].to_numpy(dtype=float)
        return _shares(self._weights @ (scores * counted), self._weights @ counted)


def _shares(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Parts by wholes, and 0 where there is nothing."""
    return np.divide(parts, wholes, out=np.zeros_like(parts), where=wholes > 0)


def _one_hot(answers: pd.Series, labels: Sequence[str]) -> np.ndarray:
    return np.stack([(answers == label).to_numpy(dtype=float) for label in labels], axis=1)


def _interval(scores: np.ndarray, *, of: int = 1) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2 / of
    low, high = np.percentile(scores[1:], [tail, 100 - tail])
    return Interval(float(scores[0]), float(low), float(high))
