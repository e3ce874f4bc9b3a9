"""Any number, as the expected value of a distribution over bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lora_fsdp.tasks.answers.classic import AVERAGE, fitted_tfidf, outputs_of
from lora_fsdp.tasks.answers.kind import TFIDF, AnswerKind, ModelOutputs, Section
from lora_fsdp.tasks.answers.ordered import ERROR, ROOT_ERROR, SPEARMAN, rank_correlation
from lora_fsdp.tasks.example import Example

R2 = "r2"


class Numbers(AnswerKind):
    """The mean of `centres`, each weighed by the likelihood of its text.

    A right number between two centres is shared between them so that their mean is the number
    ("two-hot", as in Farebrother et al., "Stop Regressing", arXiv 2403.03950).

    Args:
        centres: the bins' centres as texts, in ascending order.
    """

    name = "numbers"
    description = "a number, the expected value of a distribution over bins"
    report_sections = (Section.SCORES,)
    answer_column = "predicted_number"
    reading = (
        "The answer is the expected value: the mean of the bins' centres, each weighed by the "
        "likelihood of its text with the end token."
    )

    def __init__(self, centres: Sequence[str]) -> None:
        self.centres = tuple(centres)

    @cached_property
    def values(self) -> np.ndarray:
        """[K] the centres as numbers."""
        return np.array(self.centres, dtype=np.float64)

    def candidates(self, example: Example) -> Sequence[str]:
        """Every centre, after a space."""
        return [f" {centre}" for centre in self.centres]

    def share(self, number: float) -> tuple[float, ...]:
        """[K] how much of `number` is each centre's; beyond the ends it is the last one's."""
        return tuple(self._shared(np.array([number]))[0].tolist())

    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str | None]:
        """The expected value, with six digits."""
        return [f"{value:.6g}" for value in self._moments(outputs)[0].tolist()]

    def probabilities(self, outputs: ModelOutputs) -> Sequence[float | None]:
        """Of the centre that is nearest to the expected value."""
        expected = self._moments(outputs)[0]
        nearest = np.abs(expected[:, None] - self.values[None]).argmin(axis=1)
        given = zip(outputs.probabilities.tolist(), nearest.tolist(), strict=True)
        return [probabilities[place] for probabilities, place in given]

    def metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """Of the numbers given.

        Args:
            targets: the right numbers.
            predictions: as many; `None` counts as the mean of the right ones.

        Returns:
            `r2` (1 less the squared errors by the squared distances from the targets' mean; 0 where
            all targets are the same), `mean_absolute_error` and `root_mean_squared_error` in the
            numbers' unit, and `spearman`.
        """
        right = np.array(targets, dtype=np.float64)
        given = np.array(
            [right.mean() if answer is None else float(answer) for answer in predictions]
        )
        return {
            R2: float(_r2_shares(right, given).mean()),
            ERROR: float(np.abs(right - given).mean()),
            ROOT_ERROR: float(np.sqrt(np.square(right - given).mean())),
            SPEARMAN: rank_correlation(right, given),
        }

    def row_scores(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """Of R², with the variance of the right numbers held fixed, and of the mean error."""
        right = np.array([self.answer_of(example) for example in examples], dtype=np.float64)
        given = np.array(self.answers(examples, outputs), dtype=np.float64)
        if metric == R2:
            return _r2_shares(right, given).tolist()
        return np.abs(right - given).tolist() if metric == ERROR else None

    def classic(
        self, train: Sequence[Example], asked: Sequence[Example]
    ) -> Mapping[str, ModelOutputs]:
        """The training rows' mean, and a ridge regression on TF-IDF."""
        from sklearn.linear_model import Ridge

        right = np.array([self.answer_of(example) for example in train], dtype=np.float64)
        mean = np.full(len(asked), right.mean())
        found = {AVERAGE: outputs_of(self._shared(mean))}
        texts = [example.prompt.content for example in train]
        vectorizer = fitted_tfidf(texts)
        if vectorizer is not None:
            model = Ridge().fit(vectorizer.transform(texts), right)
            new = vectorizer.transform([example.prompt.content for example in asked])
            found[TFIDF] = outputs_of(self._shared(model.predict(new)))
        return found

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """The distribution's standard deviation."""
        return {"spread": self._moments(outputs)[1].tolist()}

    def predicted_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """The number and its spread."""
        answers = {self.answer_column: list(map(float, self.answers(examples, outputs)))}  # type: ignore[arg-type]
        return {**answers, **self.run_columns(examples, outputs)}

    def announcement(self, *, max_new_tokens: int) -> str:
        """Where the bins are."""
        return (
            f"a number, from {len(self.centres)} bins between {self.centres[0]} and "
            f"{self.centres[-1]}"
        )

    def _moments(self, outputs: ModelOutputs) -> tuple[np.ndarray, np.ndarray]:
        """[N] and [N], mean and standard deviation."""
        if not len(outputs.log_likelihoods):  # of no examples there is no distribution either
            return np.zeros(0), np.zeros(0)
        probabilities = outputs.probabilities
        expected = probabilities @ self.values
        distances = np.square(self.values[None] - expected[:, None])
        return expected, np.sqrt((probabilities * distances).sum(axis=1))

    def _shared(self, numbers: np.ndarray) -> np.ndarray:
        """[N, K], of each number what is each centre's."""
        inside = np.clip(numbers, self.values[0], self.values[-1])
        above = np.clip(np.searchsorted(self.values, inside), 1, len(self.values) - 1)
        low, high = self.values[above - 1], self.values[above]
        of_high = (inside - low) / (high - low)
        shares = np.zeros((len(numbers), len(self.values)))
        rows = np.arange(len(numbers))
        shares[rows, above - 1], shares[rows, above] = 1 - of_high, of_high
        return shares


def _r2_shares(right: np.ndarray, given: np.ndarray) -> np.ndarray:
    """[N], of which R² is the mean."""
    variance = right.var()
    return 1 - np.square(right - given) / variance if variance else np.zeros(len(right))
