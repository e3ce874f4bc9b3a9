"""What every kind of answer says of itself. Arrays and texts only: no tokenizer, device or rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from lora_fsdp.tasks.example import Example

# What a tuned model should beat, as it is called in `metrics.json` and in tables.
MAJORITY, TFIDF = "majority", "TF-IDF + logistic"
# Columns of predictions: a label's probability, a row's own choices with theirs, and the score of a
# row by "<metric>/<system>".
PROBABILITY_OF, CHOICES, SCORE_BY = "probability/", "choices", "score/"
# Beside a score, how much it counts in the mean, where rows do not count alike.
WEIGHT_BY = "weight/"


class Section(StrEnum):
    """The report's sections about answers, row by row."""

    ANSWERS = "answers"  # confusions, label by label; needs a `probability/<label>` column for each
    CHOICES = "choices"  # confident mistakes and calibration, of any answer with a probability
    FREE_TEXT = "free_text"  # which targets the model generates exactly
    SHARES = "shares"  # distributions beside the rows' own
    QUESTIONS = "questions"  # several questions about one text, each by itself
    SEVERAL = "several"  # labels that may apply at once, each by itself
    SCORES = "numbers"  # how far off answers that are numbers are


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """What a model gives for N examples.

    Attributes:
        log_likelihoods: [N, A] float32, log-probability of each of up to A scored texts with its
            end token, minus infinity where an example has fewer; [N, 0] if nothing was scored.
        tokens: [N, A] how many tokens each of them has, 0 where an example has fewer.
        texts: what greedy decoding generated, N texts; none if nothing was generated.
        reference: [N, A] float32, `log_likelihoods` of the frozen base; `None` if it was not asked.
    """

    log_likelihoods: np.ndarray
    tokens: np.ndarray
    texts: Sequence[str] = ()
    reference: np.ndarray | None = None

    @property
    def best(self) -> list[int]:
        """[N], the place of each example's most likely text."""
        if not len(self.log_likelihoods):  # of no examples there is not even a first text
            return []
        return self.log_likelihoods.argmax(axis=1).tolist()

    @property
    def probabilities(self) -> np.ndarray:
        """[N, A] float64, softmax over each example's texts."""
        scores = self.log_likelihoods.astype(np.float64)
        powers = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
        return powers / powers.sum(axis=1, keepdims=True)

    def of(self, places: Sequence[int]) -> ModelOutputs:
        """Those of the examples at `places`."""
        chosen = list(places)
        texts = [self.texts[place] for place in chosen] if self.texts else ()
        reference = None if self.reference is None else self.reference[chosen]
        return ModelOutputs(self.log_likelihoods[chosen], self.tokens[chosen], texts, reference)


@dataclass(frozen=True, slots=True)
class Labelled:
    """One question with one right answer of a set, as N rows of predictions have it.

    Attributes:
        name: of the question; "" = rows have but one.
        options: the A possible answers.
        given: [N] the right answer as a row has it; `None` where it has none.
        probabilities: [N, A] float64 of the options; anything where none is given.
    """

    name: str
    options: Sequence[str]
    given: Sequence[str | None]
    probabilities: np.ndarray


class AnswerKind(ABC):
    """One kind of answer. All that depends on the kind is asked of it, and of nothing else.

    A task names its kind by `Task.answer_kind`. A subclass says at least which texts are scored and
    which answer they make; the rest has defaults that fit one answer of several, the likeliest.

    Attributes:
        name: as it is called in files.
        description: for `lora-fsdp tasks show`.
        labels: the answers that all rows share, in the order of their candidates; empty if there
            are none. A label set is checked for labels that a tokenizer cannot tell apart.
        generates_text: whether a model must generate text for an answer, beside what is scored.
        rivals: the classic baselines that fit, `MAJORITY` and `TFIDF`, where they answer with one
            of all right answers; others are those of `classic`.
        report_sections: the report's sections about answers that fit.
        answer_column: the column with the answer in the output of `lora-fsdp predict`.
        objective: what is minimised, by its name in `training/step/objectives/choice.py`.
        losses: the options, beside label smoothing, that change what is minimised and fit.
        reading: how an answer is read from the likelihoods, as a sentence of the model card; "" =
            the likeliest one is the answer, or the generated text is.
        decided: what decides an answer beside the likelihoods, such as thresholds, as part of a
            sentence; "" = nothing.
        asked_alike: whether every row is asked the same questions, each with the same options.
        needs_reference: whether an answer is read from the frozen base's log-likelihoods as well.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    labels: Sequence[str] = ()
    generates_text: ClassVar[bool] = False
    rivals: ClassVar[Sequence[str]] = ()
    report_sections: ClassVar[Sequence[Section]] = (Section.CHOICES,)
    answer_column: ClassVar[str] = "predicted_answer"
    objective: ClassVar[str] = "supervised"
    losses: ClassVar[Sequence[str]] = ()
    reading: ClassVar[str] = ""
    needs_reference: ClassVar[bool] = False
    asked_alike: ClassVar[bool] = False
    decided: str = ""

    @abstractmethod
    def candidates(self, example: Example) -> Sequence[str]:
        """The texts that are scored after the prompt; none = the target alone."""

    def contexts(self, example: Example) -> Sequence[str]:
        """What stands before each candidate as given, the same for all rows; none = nothing."""
        return ()

    def objective_settings(self) -> dict[str, Any]:
        """What the objective is made with, by the names of its arguments."""
        return {}

    @abstractmethod
    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str | None]:
        """The answer to each of N examples; `None` = no answer."""

    def shares(self, example: Example) -> Sequence[float]:
        """How right each candidate is: the example's own shares, or 1 for its target."""
        if example.shares:
            return example.shares
        return [float(text == example.target) for text in self.candidates(example)]

    def shown(self, example: Example) -> str:
        """The right answer of a row that a prompt shows as an example, as it stands there.

        Where questions stand before the answers (`contexts`), each that the row answers has a line.
        """
        contexts = self.contexts(example)
        if not contexts:
            return example.target or ""
        asked = zip(contexts, self.candidates(example), self.shares(example), strict=True)
        return "\n".join(f"{context}{text}" for context, text, share in asked if share > 0)

    def answer_of(self, example: Example) -> str:
        """The right answer, as metrics compare it with those of `answers`."""
        return (example.target or "").strip()

    def as_decided(self, examples: Sequence[Example], outputs: ModelOutputs) -> ModelOutputs:
        """Outputs of a rival of the tuned model, as if the answers were decided for it as well.

        What decides the rival's answer to a row is chosen by other rows than that one.
        """
        return outputs

    def probabilities(self, outputs: ModelOutputs) -> Sequence[float | None]:
        """[N], from 0 to 1, of each answer given; `None` where it is not known."""
        return outputs.probabilities.max(axis=1, initial=0.0).tolist()

    def probabilities_by_question(self, outputs: ModelOutputs) -> Sequence[np.ndarray]:
        """Of each question [N, options] float64 probabilities; where all rows are `asked_alike`."""
        return [outputs.probabilities]

    def metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """Metrics of the answers against the right ones, which any task of this kind has."""
        return {}

    def metrics_of_outputs(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, float]:
        """Metrics that the answers alone do not give, of examples that all have a target."""
        return {}

    def row_scores(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """[N], of which `metric` is the mean, for its interval; `None` if it is no such mean.

        What follows from the answers alone needs none: accuracy, F1 of labels.
        """
        return None

    def row_weights(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """[N], how much each of `row_scores` counts in the mean; `None` = all alike."""
        return None

    def confusion_matrix(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> pd.DataFrame | None:
        """Counts of rows, true by predicted answer; `None` where there is no such table."""
        return None

    def chance(self, examples: Sequence[Example]) -> dict[str, float]:
        """Metrics that guessing has on average; empty if it says nothing."""
        return {}

    def chance_scores(self, metric: str, examples: Sequence[Example]) -> Sequence[float] | None:
        """[N], what guessing is expected to score on each row, of which `chance` is the mean."""
        return None

    def classic(
        self, train: Sequence[Example], asked: Sequence[Example]
    ) -> Mapping[str, ModelOutputs]:
        """What classic baselines, trained on `train`, give for `asked`, as if they were models.

        Those of `rivals` give an answer only.
        """
        return {}

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """Further columns of a run's `predictions.csv`, beside the answer and its probability."""
        return {}

    def predicted_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """The columns that `lora-fsdp predict` adds to a table; all names for no examples too."""
        return {
            self.answer_column: self.answers(examples, outputs),
            "probability": self.probabilities(outputs),
            **self.run_columns(examples, outputs),
        }

    def labelled(self, predictions: pd.DataFrame) -> Sequence[Labelled]:
        """What rows are labelled with, one question after the other, for a look at wrong labels.

        Args:
            predictions: N rows of a run's `predictions.csv`, with its columns.

        Returns:
            none where a row's answer is not one of a set that all rows share.
        """
        return ()

    def announcement(self, *, max_new_tokens: int) -> str:
        """What the answers are, for the lines with which a run begins.

        Args:
            max_new_tokens: longest generated text.
        """
        return self.description
