"""The better one of two texts, by how much the adapter prefers it over the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_fsdp.tasks.answers.classic import fitted_tfidf, outputs_of
from lora_fsdp.tasks.answers.kind import TFIDF, AnswerKind, ModelOutputs
from lora_fsdp.tasks.example import Example

ACCURACY, MARGIN = "accuracy", "reward_margin"
LONGER = "longer text"


class Pairs(AnswerKind):
    """One of `Example.choices`, which are two: the one with the larger reward.

    A text's reward is `beta` times its log-likelihood less that of the frozen base (Rafailov et
    al., arXiv 2305.18290). An adapter that changes nothing has no rewards: of it the text that is
    likelier by token is the answer.

    Args:
        beta: of the objective.
    """

    name = "pairs"
    description = "the better one of two texts, by its reward over the base"
    answer_column = "preferred"
    objective = "preference"
    needs_reference = True
    reading = (
        "The answer is the text whose log-likelihood the adapter has raised more above the base's."
    )

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def objective_settings(self) -> dict[str, Any]:
        """`beta`."""
        return {"beta": self.beta}

    def candidates(self, example: Example) -> Sequence[str]:
        """The two texts."""
        return example.choices

    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str | None]:
        """The first text where its reward is larger, else the second."""
        given = zip(examples, self._compared(outputs).tolist(), strict=True)
        return [example.choices[0 if margin > 0 else 1].strip() for example, margin in given]

    def probabilities(self, outputs: ModelOutputs) -> Sequence[float | None]:
        """That the answer is the better text: the sigmoid of the difference of the rewards."""
        return _sigmoid(np.abs(self.beta * self._compared(outputs))).tolist()

    def rewards(self, outputs: ModelOutputs) -> np.ndarray:
        """[N, 2]; all 0 where the base was not asked."""
        if outputs.reference is None:
            return np.zeros((len(outputs.log_likelihoods), 2))
        return self.beta * (outputs.log_likelihoods.astype(np.float64) - outputs.reference)

    def metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """The share of pairs whose better text is preferred."""
        right = [one == other for one, other in zip(targets, predictions, strict=True)]
        return {ACCURACY: sum(right) / len(right)}

    def metrics_of_outputs(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, float]:
        """The better text's reward less the other's, as a mean, and the loss that is minimised."""
        if outputs.reference is None:
            return {}
        margins = self._margins(examples, outputs)
        return {"loss": float(np.logaddexp(0, -margins).mean()), MARGIN: float(margins.mean())}

    def row_scores(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """Of the margin."""
        if metric != MARGIN or outputs.reference is None:
            return None
        return self._margins(examples, outputs).tolist()

    def chance(self, examples: Sequence[Example]) -> dict[str, float]:
        """A half."""
        return {ACCURACY: 0.5}

    def chance_scores(self, metric: str, examples: Sequence[Example]) -> Sequence[float] | None:
        """A half of each pair."""
        return [0.5] * len(examples) if metric == ACCURACY else None

    def classic(
        self, train: Sequence[Example], asked: Sequence[Example]
    ) -> Mapping[str, ModelOutputs]:
        """The longer text, and a regression on how the TF-IDF of the two texts differs."""
        lengths = np.array([[len(text) for text in example.choices] for example in asked])
        longer = _sigmoid((lengths[:, 0] - lengths[:, 1]).astype(np.float64))
        found = {LONGER: outputs_of(np.stack([longer, 1 - longer], axis=1))}
        first = _tfidf_difference(train, asked)
        if first is not None:
            found[TFIDF] = outputs_of(np.stack([first, 1 - first], axis=1))
        return found

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """The rewards of both texts, named as the columns of preference data are."""
        rewards = self.rewards(outputs)
        return {
            "reward_chosen": rewards[:, 0].tolist(),
            "reward_rejected": rewards[:, 1].tolist(),
        }

    def announcement(self, *, max_new_tokens: int) -> str:
        """That they stand in the rows."""
        return "the better one of each row's two texts"

    def _compared(self, outputs: ModelOutputs) -> np.ndarray:
        """[N] more than 0 where the first text is preferred."""
        rewards = self.rewards(outputs)
        if rewards.any() or not len(rewards):
            return (rewards[:, 0] - rewards[:, 1]) / self.beta
        # By token, as a longer text is less likely for its length alone.
        scores = outputs.log_likelihoods.astype(np.float64) / outputs.tokens
        return scores[:, 0] - scores[:, 1]

    def _margins(self, examples: Sequence[Example], outputs: ModelOutputs) -> np.ndarray:
        rewards = self.rewards(outputs)
        first_is_better = [example.choices[0] == example.target for example in examples]
        return (rewards[:, 0] - rewards[:, 1]) * np.where(first_is_better, 1, -1)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -700, 700)))


def _tfidf_difference(train: Sequence[Example], asked: Sequence[Example]) -> np.ndarray | None:
    """[N] the probability that the first text is better; `None` with nothing to learn from.

    A regression without intercept on differences is the model of Bradley and Terry (1952).
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    vectorizer = fitted_tfidf([text for example in train for text in example.choices])
    if vectorizer is None:
        return None

    def differences(examples: Sequence[Example]) -> Any:
        first, second = (
            vectorizer.transform([example.choices[place] for example in examples])
            for place in (0, 1)
        )
        return first - second

    known = differences(train)
    better = np.array([example.choices[0] == example.target for example in train])
    model = LogisticRegression(C=10, fit_intercept=False, max_iter=1000)
    model.fit(vstack([known, -known]), np.concatenate([better, ~better]))
    return model.predict_proba(differences(asked))[:, 1]
