"""Several questions about one text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pandas as pd

from lora_fsdp.errors import ArgumentError, SingleLabelError, did_you_mean
from lora_fsdp.tasks.answers.questions import Question, Questions, as_answer
from lora_fsdp.tasks.cells import cell_text, label_fault, label_text
from lora_fsdp.tasks.columns import ColumnTask
from lora_fsdp.tasks.rating import number_of, number_text
from lora_fsdp.tasks.registry import register_task

_KEYS = ("column", "ask", "labels", "scores")


@register_task
class QuestionsTask(ColumnTask):
    """Answers several questions about each text, from yes/no to scores, in one pass.

    Attributes:
        questions: a mapping for each: `column` with its right answers, which may be empty in some
            rows; `ask`, its words ("<column>?" otherwise); and `labels`, or `scores` for numbers,
            its possible answers (those that occur in the table otherwise).
    """

    name = "questions"
    description = "Several questions about each text (yes/no, labels, scores), in one pass"
    primary_metric = "answer_accuracy"

    cue = "\n"  # the questions stand after it
    instruction = "Read the following text and answer the question about it:"
    text_column = "text"
    questions: Sequence[Mapping[str, Any]] = ()

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        questions: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(instruction=instruction, text_column=text_column)
        if questions is not None:
            self.questions = _checked(questions)

    @property
    def answer_kind(self) -> Questions:
        """All questions."""
        return Questions([_question(one) for one in self.questions])

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Self:
        """A copy that knows all possible answers, after every row has been checked.

        Raises:
            ArgumentError: there are no questions.
            NoRowsError, ColumnNotFoundError, MalformedRowError: the table does not fit.
            SingleLabelError: all rows have the same answer to a question.
        """
        if not self.questions:
            raise ArgumentError(
                f"Task {self.name!r} has no questions: name them in --task_options, "
                '\'{"questions": [{"column": "late", "ask": "Is it late?"}]}\'.'
            )
        return super().bind(table, with_labels=with_labels, for_training=for_training)

    def settled_by(self, table: pd.DataFrame) -> Self:
        """A copy whose questions have all answers that occur."""
        task = copy.copy(self)
        task.questions = [self._with_options(one, table) for one in self.questions]
        return task

    def _with_options(self, question: Mapping[str, Any], table: pd.DataFrame) -> dict[str, Any]:
        if "labels" in question or "scores" in question:
            return dict(question)
        found = sorted({label_text(cell) for cell in table[question["column"]]} - {""})
        if len(found) < 2:
            raise SingleLabelError(
                f"Column {question['column']!r} has {len(found)} different answer(s): a question "
                "needs two or more; name them in its labels."
            )
        return {**question, "labels": found}

    def only(self, questions: Sequence[str]) -> Self:
        """The same task with some of its questions, by their columns, in the task's order.

        An answer is the same as beside the others: every question is asked by itself.

        Raises:
            ArgumentError: none is named, one twice, or one that there is not.
        """
        known = list(self.answer_columns())
        for name in questions:
            if name not in known:
                hint = did_you_mean(name, known) or f" There are {', '.join(map(repr, known))}."
                raise ArgumentError(f"There is no question {str(name)[:80]!r}.{hint}")
        if not questions or len(set(questions)) < len(questions):
            raise ArgumentError(
                f"Name one question or more, each once, of {', '.join(map(repr, known))}."
            )
        task = copy.copy(self)
        task.questions = [one for one in self.questions if one["column"] in questions]
        return task

    def options(self) -> dict[str, Any]:
        """Instruction, column and questions."""
        return {**super().options(), "questions": [dict(one) for one in self.questions]}

    def answer_columns(self) -> Sequence[str]:
        """A column for each question."""
        return [question["column"] for question in self.questions]

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """No text, an answer that is none of a question's, or no answer at all."""
        if not cell_text(row[self.text_column]).strip():
            return f"nothing in column {self.text_column!r}"
        if not with_labels:
            return None
        for question in self.questions:
            cell = row[question["column"]]
            column = f"column {question['column']!r}"
            if fault := label_fault(cell):
                return f"{column} holds {fault}"
            if not label_text(cell):
                continue
            if "scores" in question and number_of(cell) is None:
                return f"{column} holds {label_text(cell)[:40]!r}, no number"
            known = question.get("scores", question.get("labels"))
            if known is not None and _answer(question, cell) not in known:
                return (
                    f"{column}: {label_text(cell)[:40]!r} is none of {', '.join(map(repr, known))}"
                )
        if not self._answers(row):
            return f"no answer in columns {', '.join(map(repr, self.answer_columns()))}"
        return None

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The answers that the row has, as JSON."""
        return as_answer(self._answers(row))

    def build_shares(self, row: Mapping[str, Any]) -> tuple[float, ...]:
        """1 for each right answer; a question that the row does not answer has none."""
        answers = self._answers(row)
        return tuple(
            float(answers.get(question.column) == option)
            for question in self.answer_kind.questions
            for option in question.options
        )

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """See `Questions.metrics`."""
        return self.answer_kind.metrics(targets, predictions)

    def _answers(self, row: Mapping[str, Any]) -> dict[str, str]:
        return {
            question["column"]: _answer(question, row[question["column"]])
            for question in self.questions
            if label_text(row[question["column"]])
        }


def _answer(question: Mapping[str, Any], cell: object) -> str:
    return number_text(cell) if "scores" in question else label_text(cell)


def _question(given: Mapping[str, Any]) -> Question:
    options = given.get("scores", given.get("labels", ()))
    return Question(given["column"], given["ask"], tuple(options), is_score="scores" in given)


def _checked(questions: object) -> list[dict[str, Any]]:
    """The questions with their words and options as texts."""
    listed = list(questions) if isinstance(questions, Sequence) else []
    if not listed or isinstance(questions, str):
        raise ArgumentError(f"questions must be a list of mappings, not {str(questions)[:80]!r}.")
    checked = [_checked_one(number, one) for number, one in enumerate(listed, start=1)]
    columns = [one["column"] for one in checked]
    words = [one["ask"] for one in checked]
    if len(set(columns)) < len(columns) or len(set(words)) < len(words):
        raise ArgumentError(f"Two questions have one column or the same words: {columns}.")
    return checked


def _checked_one(number: int, given: object) -> dict[str, Any]:
    place = f"Question {number}"
    if not isinstance(given, Mapping):
        raise ArgumentError(f"{place} must be a mapping with a column, not {str(given)[:80]!r}.")
    if unknown := [str(key) for key in given if key not in _KEYS]:
        raise ArgumentError(
            f"{place} has the unknown key {unknown[0]!r}.{did_you_mean(unknown[0], _KEYS)} "
            f"Known: {', '.join(_KEYS)}."
        )
    column = given.get("column")
    if not isinstance(column, str) or not column.strip():
        raise ArgumentError(f"{place} names no column with its answers.")
    ask = given.get("ask") or f"{column}?"
    if not isinstance(ask, str) or not ask.strip():
        raise ArgumentError(f"{place}: ask must be a text, not {ask!r}.")
    found: dict[str, Any] = {"column": column, "ask": ask.strip()}
    if "labels" in given and "scores" in given:
        raise ArgumentError(f"{place} has both labels and scores: keep one.")
    for key in ("labels", "scores"):
        if key in given:
            found[key] = _options(place, key, given[key])
    return found


def _options(place: str, key: str, given: object) -> list[str]:
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    if key == "scores":
        if bad := [one for one in listed if number_of(one) is None]:
            raise ArgumentError(f"{place}: scores must be numbers, not {bad[0]!r}.")
        texts = sorted({number_text(one) for one in listed}, key=float)
    else:
        # YAML reads a bare yes as true.
        if any(isinstance(one, bool) for one in listed):
            raise ArgumentError(f"{place}: put labels in quotes; a bare yes or no is no text.")
        texts = list(dict.fromkeys(label_text(one) for one in listed))
    if len(texts) < max(2, len(listed)) or "" in texts:
        raise ArgumentError(f"{place}: {key} must be a list of two or more, none twice: {given!r}.")
    return texts
