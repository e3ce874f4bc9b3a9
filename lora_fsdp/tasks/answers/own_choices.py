"""One of a row's own choices, the likeliest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_fsdp.tasks.answers.kind import CHOICES, AnswerKind, ModelOutputs
from lora_fsdp.tasks.example import Example


class OwnChoices(AnswerKind):
    """One of `Example.choices`."""

    name = "own_choices"
    description = "one of each row's own choices, the likeliest"
    answer_column = "predicted_choice"

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
        per_token = outputs.log_likelihoods / np.maximum(outputs.tokens, 1).astype(np.float32)
        chosen = _chosen(examples, per_token.argmax(axis=1).tolist())
        right = [self.answer_of(example) for example in examples]
        return {"accuracy_normalised": _share_right(right, chosen)}

    def chance(self, examples: Sequence[Example]) -> dict[str, float]:
        """The mean share of right answers of one who guesses among each row's choices."""
        shares = [1 / len(example.choices) for example in examples]
        return {"accuracy": sum(shares) / len(shares)} if shares else {}

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
