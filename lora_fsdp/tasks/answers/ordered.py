"""One of a scale of numbers, by the expected value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lora_fsdp.tasks.answers.classic import classic_outputs
from lora_fsdp.tasks.answers.closed_set import ClosedSet
from lora_fsdp.tasks.answers.kind import ModelOutputs, Section
from lora_fsdp.tasks.example import Example

ACCURACY, KAPPA, ERROR = "accuracy", "quadratic_kappa", "mean_absolute_error"
ROOT_ERROR, SPEARMAN, RANKED = (
    "root_mean_squared_error",
    "spearman",
    "ranked_probability_score",
)


class OrderedScores(ClosedSet):
    """One of `levels`, the one nearest to the expected value of their likelihoods.

    Args:
        levels: the levels' texts, each a number, in ascending order.
        target_of: the text that stands for a level (`Task.target_of`).
    """

    name = "ordered_scores"
    description = "a level of a scale, the one nearest to the expected value"
    rivals = ()
    report_sections = (Section.SCORES, Section.ANSWERS)
    answer_column = "predicted_score"
    losses = ("focal_gamma", "ranked_weight")
    reading = (
        "The answer is the level nearest to the expected value: the levels' mean, each weighed by "
        "the likelihood of its text with the end token."
    )

    def __init__(self, levels: Sequence[str], target_of: Callable[[str], str]) -> None:
        super().__init__(levels, target_of)

    @cached_property
    def values(self) -> np.ndarray:
        """[K] the levels as numbers."""
        return np.array(self.labels, dtype=np.float64)

    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str | None]:
        """The level nearest to the expected value; of two as near, the lower one."""
        return [self.labels[place] for place in self._nearest(outputs)]

    def probabilities(self, outputs: ModelOutputs) -> Sequence[float | None]:
        """Of the level that is the answer, which need not be the likeliest."""
        given = zip(outputs.probabilities.tolist(), self._nearest(outputs), strict=True)
        return [probabilities[place] for probabilities, place in given]

    def expected(self, outputs: ModelOutputs) -> np.ndarray:
        """[N], each example's expected value."""
        return outputs.probabilities @ self.values

    def metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """Of the levels given.

        Args:
            targets: the right levels.
            predictions: as many; `None` counts as the level that is farthest from the right one.

        Returns:
            `quadratic_kappa` (Cohen, 1968; by the levels' values: 1 = all right, 0 = no better than
            answers as frequent as these at random, below 0 worse), `accuracy` and
            `mean_absolute_error`, in the scale's unit.
        """
        right, given = self._values_of(targets, predictions)
        return {
            KAPPA: float(np.mean(_kappa_shares(right, given))),
            ACCURACY: float(np.mean(right == given)),
            ERROR: float(np.abs(right - given).mean()),
        }

    def metrics_of_outputs(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, float]:
        """Of the expected value and of the whole distribution.

        Returns:
            `root_mean_squared_error` and `spearman` of the expected value (0 where all rows have
            one value), and `ranked_probability_score` (Epstein, 1969): the squared distance between
            the cumulative probabilities and the step at the right level, summed over all levels but
            the last; 0 is best.
        """
        right, expected = self._right(examples), self.expected(outputs)
        return {
            ROOT_ERROR: float(np.sqrt(np.square(expected - right).mean())),
            SPEARMAN: rank_correlation(right, expected),
            RANKED: float(self._ranked(right, outputs).mean()),
        }

    def row_scores(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """Of kappa, with the disagreement that is expected at random held fixed."""
        right = self._right(examples)
        given = self.values[self._nearest(outputs)]
        of_rows: Mapping[str, Callable[[], np.ndarray]] = {
            KAPPA: lambda: _kappa_shares(right, given),
            ERROR: lambda: np.abs(right - given),
            RANKED: lambda: self._ranked(right, outputs),
        }
        return of_rows[metric]().tolist() if metric in of_rows else None

    def chance(self, examples: Sequence[Example]) -> dict[str, float]:
        """Of one who guesses among the levels."""
        metrics = {ACCURACY: 1 / len(self.labels), KAPPA: 0.0}
        return metrics | {ERROR: float(np.mean(self.chance_scores(ERROR, examples) or [0.0]))}

    def chance_scores(self, metric: str, examples: Sequence[Example]) -> Sequence[float] | None:
        """The mean distance from the right level, for the mean error."""
        if metric != ERROR:
            return None
        right = self._right(examples)
        return np.abs(right[:, None] - self.values[None]).mean(axis=1).tolist()

    def classic(
        self, train: Sequence[Example], asked: Sequence[Example]
    ) -> Mapping[str, ModelOutputs]:
        """The training rows' average, and TF-IDF; of both the expected value counts."""
        return classic_outputs(self, train, asked, options=[len(self.labels)])

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """The expected value, and every level's probability."""
        expected = {"expected_score": self.expected(outputs).tolist()}
        return expected | super().run_columns(examples, outputs)

    def announcement(self, *, max_new_tokens: int) -> str:
        """The levels."""
        return f"a score: {', '.join(self.labels)}"

    def _nearest(self, outputs: ModelOutputs) -> list[int]:
        distances = np.abs(self.expected(outputs)[:, None] - self.values[None])
        return distances.argmin(axis=1).tolist()

    def _right(self, examples: Sequence[Example]) -> np.ndarray:
        return np.array([self.answer_of(example) for example in examples], dtype=np.float64)

    def _values_of(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        right = np.array(targets, dtype=np.float64)
        ends = self.values[[0, -1]]
        farthest = ends[np.abs(right[:, None] - ends[None]).argmax(axis=1)]
        given = [
            default if answer is None else float(answer)
            for answer, default in zip(predictions, farthest.tolist(), strict=True)
        ]
        return right, np.array(given)

    def _ranked(self, right: np.ndarray, outputs: ModelOutputs) -> np.ndarray:
        below = np.cumsum(outputs.probabilities, axis=1)[:, :-1]
        step = self.values[None, :-1] >= right[:, None]
        return np.square(below - step).sum(axis=1)


def _kappa_shares(right: np.ndarray, given: np.ndarray) -> np.ndarray:
    """[N], of which the quadratic kappa is the mean."""
    # Between every target and every answer: the mean of (a - b)² over both.
    at_random = right.var() + given.var() + (right.mean() - given.mean()) ** 2
    errors = np.square(right - given)
    if at_random == 0:  # one level is all there is, in targets and in answers
        return np.ones(len(right))
    return 1 - errors / at_random


def rank_correlation(right: np.ndarray, given: np.ndarray) -> float:
    """Spearman's; 0 where there is no order, as all are the same."""
    if len(right) < 2 or np.ptp(right) == 0 or np.ptp(given) == 0:
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr(right, given).statistic)
