"""One of a closed set of labels, the likeliest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from lora_fsdp.tasks.answers.kind import (
    MAJORITY,
    PROBABILITY_OF,
    TFIDF,
    AnswerKind,
    Labelled,
    ModelOutputs,
    Section,
)
from lora_fsdp.tasks.example import Example

# The column of the confusion matrix for rows without an answer from the label set.
NO_ANSWER = "(none)"


class ClosedSet(AnswerKind):
    """One of `labels`.

    Args:
        labels: the label set.
        target_of: the text that stands for a label (`Task.target_of`).
    """

    name = "closed_set"
    description = "one of a closed set, the likeliest"
    rivals: ClassVar[Sequence[str]] = (MAJORITY, TFIDF)
    report_sections: ClassVar[Sequence[Section]] = (Section.ANSWERS,)
    answer_column = "predicted_label"
    losses: ClassVar[Sequence[str]] = ("focal_gamma",)
    asked_alike = True

    def __init__(self, labels: Sequence[str], target_of: Callable[[str], str]) -> None:
        self.labels = tuple(labels)
        self._target_of = target_of

    def candidates(self, example: Example) -> Sequence[str]:
        """Every label's text."""
        return self._texts

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        return tuple(map(self._target_of, self.labels))

    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str | None]:
        """The likeliest label."""
        return [self.labels[best] for best in outputs.best]

    def answer_of(self, example: Example) -> str:
        """The label whose text the target is."""
        if example.target in self._texts:
            return self.labels[self._texts.index(example.target)]
        return super().answer_of(example)

    def metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """Accuracy, F1 and per-label scores, as scikit-learn has them.

        Args:
            targets: the right labels.
            predictions: as many labels; `None`, or what is not in the label set, counts as wrong.

        Returns:
            `accuracy`, `macro_f1`, `weighted_f1` and, for every label, `precision/<label>`,
            `recall/<label>` and `f1/<label>`, each from 0 to 1. A label that is neither a right
            answer nor a given one has 0 there and does not count in the means of F1.
        """
        # Imported here, because scikit-learn takes longer to import than everything else here.
        from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

        labels = self.labels
        answers = self._closed(predictions)
        metrics = {"accuracy": float(accuracy_score(targets, answers))}
        occurring = set(targets) | set(answers)
        counted = [label for label in labels if label in occurring] or labels
        for average in ("macro", "weighted"):
            score = f1_score(targets, answers, labels=counted, average=average, zero_division=0)
            metrics[f"{average}_f1"] = float(score)
        scores = precision_recall_fscore_support(targets, answers, labels=labels, zero_division=0)
        for kind, values in zip(("precision", "recall", "f1"), scores[:3], strict=True):
            for label, value in zip(labels, values, strict=True):
                metrics[f"{kind}/{label}"] = float(value)
        return metrics

    def confusion_matrix(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> pd.DataFrame:
        """Counts of rows, true label by predicted label, and a column "(none)" where needed."""
        from sklearn.metrics import confusion_matrix

        answers = self._closed(predictions)
        counts = confusion_matrix(targets, answers, labels=[*self.labels, NO_ANSWER])
        matrix = pd.DataFrame(
            counts[:-1],
            index=pd.Index(self.labels, name="true"),
            columns=pd.Index([*self.labels, NO_ANSWER], name="predicted"),
        )
        return matrix if NO_ANSWER in answers else matrix.drop(columns=NO_ANSWER)

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """Every label's probability."""
        columns = zip(self.labels, outputs.probabilities.T.tolist(), strict=True)
        return {f"{PROBABILITY_OF}{label}": values for label, values in columns}

    def labelled(self, predictions: pd.DataFrame) -> Sequence[Labelled]:
        """The label of each row."""
        names = [f"{PROBABILITY_OF}{label}" for label in self.labels]
        given = predictions["target"].tolist()
        return [Labelled("", self.labels, given, predictions[names].to_numpy(np.float64))]

    def announcement(self, *, max_new_tokens: int) -> str:
        """The labels."""
        return ", ".join(self.labels)

    def _closed(self, predictions: Sequence[str | None]) -> list[str]:
        known = set(self.labels)
        return [NO_ANSWER if answer not in known else str(answer) for answer in predictions]
