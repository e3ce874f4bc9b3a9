"""Several questions about one text, each with answers of its own, in one pass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.tasks.answers.classic import classic_outputs
from lora_fsdp.tasks.answers.kind import AnswerKind, Labelled, ModelOutputs, Section
from lora_fsdp.tasks.answers.ordered import ERROR
from lora_fsdp.tasks.example import Example

RIGHT = "answer_accuracy"
#: Columns of predictions: the answer to a question, its probability, and a score's expected value.
ANSWER_TO, CERTAINTY_OF, EXPECTED = "answer/", "certainty/", "expected/"
#: A column of a run's predictions: the probabilities of a question's options.
OPTIONS_OF = "options/"


@dataclass(frozen=True)
class Question:
    """A question about the text of a row.

    Attributes:
        column: with its right answers; the question's name.
        ask: its words, after the text.
        options: its possible answers; in ascending order if they are scores.
        is_score: whether the answers are numbers, of which the expected value counts.
    """

    column: str
    ask: str
    options: tuple[str, ...]
    is_score: bool = False

    @cached_property
    def values(self) -> np.ndarray:
        """The options as numbers, of a score."""
        return np.array(self.options, dtype=np.float64)

    def chosen(self, probabilities: np.ndarray) -> np.ndarray:
        """[N] places of the answers: the likeliest, or the score nearest to the expected value."""
        if not self.is_score:
            return probabilities.argmax(axis=1)
        expected = probabilities @ self.values
        return np.abs(expected[:, None] - self.values[None]).argmin(axis=1)


class Questions(AnswerKind):
    """An answer to each of `questions`, as a JSON object with the questions' columns.

    Each option is a branch after the text: the question's words, which are given, and the option.
    So every question is answered as if it had been asked alone, and the text is computed once.

    Args:
        questions: the questions.
    """

    name = "questions"
    description = "an answer to each of several questions about one text"
    report_sections = (Section.QUESTIONS,)
    answer_column = "answers"
    losses = ("focal_gamma",)
    reading = (
        "Every question is asked by itself after the prompt; its answer is the likeliest one, or "
        "of scores the one nearest to the expected value."
    )

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = tuple(questions)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many options each question has."""
        return tuple(len(question.options) for question in self.questions)

    def objective_settings(self) -> dict[str, Any]:
        """Which candidates are the answers to one question."""
        return {"questions": self.sizes}

    def candidates(self, example: Example) -> Sequence[str]:
        """Every question's options, after a space."""
        return [f" {option}" for question in self.questions for option in question.options]

    def contexts(self, example: Example) -> Sequence[str]:
        """The words of the question that an option answers."""
        return [question.ask for question in self.questions for _ in question.options]

    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str | None]:
        """All answers of each row."""
        chosen = self._chosen(outputs)
        return [
            as_answer(
                {
                    question.column: question.options[place]
                    for question, place in zip(self.questions, row, strict=True)
                }
            )
            for row in chosen.tolist()
        ]

    def probabilities(self, outputs: ModelOutputs) -> Sequence[float | None]:
        """That all answers are right, taken as independent of each other."""
        return self._certainties(outputs).prod(axis=1).tolist()

    def metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """Of the answers to what is known of each row.

        Returns:
            `answer_accuracy`, the share of right ones among all known answers, `accuracy/<column>`
            of each question, and `mean_absolute_error/<column>` of those that are scores. A
            question that no row answers has none.
        """
        right = [json.loads(target) for target in targets]
        given = [json.loads(answer or "{}") for answer in predictions]
        hits, known = _hits(right, given)
        metrics = {RIGHT: sum(hits) / max(sum(known), 1)}
        for question in self.questions:
            name = question.column
            there = [
                (one[name], other.get(name))
                for one, other in zip(right, given, strict=True)
                if name in one
            ]
            if not there:
                continue
            metrics[f"accuracy/{name}"] = sum(a == b for a, b in there) / len(there)
            if question.is_score:
                # No answer is as far off as can be.
                distances = [
                    np.abs(question.values - float(a)).max()
                    if b is None
                    else abs(float(a) - float(b))
                    for a, b in there
                ]
                metrics[f"{ERROR}/{name}"] = float(np.mean(distances))
        return metrics

    def row_scores(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """The share of right answers of each row."""
        if metric != RIGHT:
            return None
        hits, known = self._hits(examples, outputs)
        return [hit / max(count, 1) for hit, count in zip(hits, known, strict=True)]

    def row_weights(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """How many answers of each row are known."""
        return list(map(float, self._hits(examples, outputs)[1])) if metric == RIGHT else None

    def classic(
        self, train: Sequence[Example], asked: Sequence[Example]
    ) -> Mapping[str, ModelOutputs]:
        """How frequent each answer is, and TF-IDF, a regression a question."""
        return classic_outputs(self, train, asked, options=self.sizes)

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """Every question's answer and its probability, and the expected value of scores.

        Of rows with answers also all options of a question with theirs, as a JSON object.
        """
        columns: dict[str, Sequence[Any]] = {}
        chosen, certainties = self._chosen(outputs), self._certainties(outputs)
        for place, (question, given) in enumerate(
            zip(self.questions, self.probabilities_by_question(outputs), strict=True)
        ):
            columns[f"{ANSWER_TO}{question.column}"] = [
                question.options[option] for option in chosen[:, place].tolist()
            ]
            columns[f"{CERTAINTY_OF}{question.column}"] = certainties[:, place].tolist()
            if question.is_score:
                columns[f"{EXPECTED}{question.column}"] = (given @ question.values).tolist()
            if examples and all(example.target is not None for example in examples):
                columns[f"{OPTIONS_OF}{question.column}"] = [
                    json.dumps(dict(zip(question.options, row, strict=True)), ensure_ascii=False)
                    for row in given.round(6).tolist()
                ]
        return columns

    def labelled(self, predictions: pd.DataFrame) -> Sequence[Labelled]:
        """Every question by itself, of the rows that answer it."""
        right = [json.loads(target) for target in predictions["target"]]
        found = []
        for question in self.questions:
            rows = map(json.loads, predictions[f"{OPTIONS_OF}{question.column}"])
            probabilities = [[float(row[option]) for option in question.options] for row in rows]
            given = [one.get(question.column) for one in right]
            table = np.array(probabilities, dtype=np.float64)
            found.append(Labelled(question.column, question.options, given, table))
        return found

    def announcement(self, *, max_new_tokens: int) -> str:
        """The questions and their options."""
        listed = (f"{one.ask} ({', '.join(one.options)})" for one in self.questions)
        return "; ".join(listed)

    def probabilities_by_question(self, outputs: ModelOutputs) -> Sequence[np.ndarray]:
        """[N, options] of each question."""
        scores = outputs.log_likelihoods.astype(np.float64).reshape(-1, sum(self.sizes))
        found, first = [], 0
        for size in self.sizes:
            part = scores[:, first : first + size]
            powers = np.exp(part - part.max(axis=1, keepdims=True, initial=-np.inf))
            found.append(powers / powers.sum(axis=1, keepdims=True))
            first += size
        return found

    def _chosen(self, outputs: ModelOutputs) -> np.ndarray:
        """[N, questions] places of the answers."""
        given = zip(self.questions, self.probabilities_by_question(outputs), strict=True)
        return np.stack([question.chosen(one) for question, one in given], axis=1)

    def _certainties(self, outputs: ModelOutputs) -> np.ndarray:
        """[N, questions] probabilities of the answers."""
        places = self._chosen(outputs).T
        given = zip(self.probabilities_by_question(outputs), places, strict=True)
        rows = np.arange(places.shape[1])
        return np.stack([one[rows, chosen] for one, chosen in given], axis=1)

    def _hits(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> tuple[list[int], list[int]]:
        right = [json.loads(self.answer_of(example)) for example in examples]
        return _hits(right, [json.loads(one or "{}") for one in self.answers(examples, outputs)])


def as_answer(answers: Mapping[str, str]) -> str:
    """Answers by their questions' columns, as the text that an answer of this kind is."""
    return json.dumps(dict(answers), ensure_ascii=False)


def _hits(
    right: Sequence[Mapping[str, str]], given: Sequence[Mapping[str, str]]
) -> tuple[list[int], list[int]]:
    """How many answers of each row are right, and how many are known."""
    hits = [
        sum(other.get(name) == answer for name, answer in one.items())
        for one, other in zip(right, given, strict=True)
    ]
    return hits, list(map(len, right))
