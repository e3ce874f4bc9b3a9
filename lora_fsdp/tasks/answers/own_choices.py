"""One of a row's own choices, the likeliest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_fsdp.tasks.answers.kind import CHOICES, AnswerKind, ModelOutputs
from lora_fsdp.tasks.example import Example

# Metrics by which one who guesses is right in a known share of the rows.
_GUESSED = ("accuracy", "accuracy_normalised")


class OwnChoices(AnswerKind):
    """One of `Example.choices`."""

    name = "own_choices"
    description = "one of each row's own choices, the likeliest"
    answer_column = "predicted_choice"
    losses = ("focal_gamma",)

    def candidates(self, example: Example) -> Sequence[str]:
        """The row's choices."""
        return example.choices

    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str | None]:
        """The likeliest choice."""
        return _chosen(examples, outputs.best)

    def metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """The share of right choices."""
        return {"accuracy": _share_right(targets, predictions)}

    def metrics_of_outputs(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, float]:
        """`accuracy_normalised`: of the choices with the highest log-likelihood per token.

        Without that division a longer choice is less likely for its length alone.
        Source: `acc_norm` of https://github.com/EleutherAI/lm-evaluation-harness, which divides by
        characters.
        """
        right = _right_per_token(self, examples, outputs)
        return {"accuracy_normalised": sum(right) / len(right)}

    def row_scores(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """Whether the choice that is likeliest per token is right; the answers say the rest."""
        if metric != "accuracy_normalised":
            return None
        return _right_per_token(self, examples, outputs)

    def chance(self, examples: Sequence[Example]) -> dict[str, float]:
        """The mean share of right answers of one who guesses among each row's choices."""
        shares = self.chance_scores("accuracy", examples)
        return dict.fromkeys(_GUESSED, sum(shares) / len(shares)) if shares else {}

    def chance_scores(self, metric: str, examples: Sequence[Example]) -> Sequence[float] | None:
        """One by the number of the row's choices."""
        return [1 / len(example.choices) for example in examples] if metric in _GUESSED else None

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """Every row's choices with their probabilities, as a JSON object each."""
        return {CHOICES: _as_json(examples, outputs)}

    def predicted_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """The choice, its probability, and those of all, as in `run_columns`."""
        columns = super().predicted_columns(examples, outputs)
        columns["choice_probabilities"] = columns.pop(CHOICES)
        return columns

    def announcement(self, *, max_new_tokens: int) -> str:
        """That they stand in the rows."""
        return "each row's own choices"


def _chosen(examples: Sequence[Example], places: Sequence[int]) -> list[str]:
    chosen = zip(examples, places, strict=True)
    return [example.choices[place].strip() for example, place in chosen]


def _right_per_token(
    kind: OwnChoices, examples: Sequence[Example], outputs: ModelOutputs
) -> list[float]:
    """[N], 1 where the choice with the highest log-likelihood per token is the right one."""
    per_token = outputs.log_likelihoods / np.maximum(outputs.tokens, 1).astype(np.float32)
    chosen = zip(examples, _chosen(examples, per_token.argmax(axis=1).tolist()), strict=True)
    return [float(choice == kind.answer_of(example)) for example, choice in chosen]


def _share_right(targets: Sequence[str], predictions: Sequence[str | None]) -> float:
    right = [target == choice for target, choice in zip(targets, predictions, strict=True)]
    return sum(right) / len(right)


def _as_json(examples: Sequence[Example], outputs: ModelOutputs) -> list[str]:
    return [
        json.dumps(
            {
                choice.strip(): round(probability, 6)
                for choice, probability in zip(example.choices, probabilities, strict=False)
            },
            ensure_ascii=False,
        )
        for example, probabilities in zip(examples, outputs.probabilities.tolist(), strict=True)
    ]
