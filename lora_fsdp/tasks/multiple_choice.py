"""Questions whose rows bring their own answers to choose from."""

from __future__ import annotations

import copy
import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pandas as pd

from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks.cells import cell_text, cell_value
from lora_fsdp.tasks.columns import ColumnTask
from lora_fsdp.tasks.example import Prompt
from lora_fsdp.tasks.registry import register_task

# Names of columns with a choice each, as tables have them: those of a line belong together.
_USUAL_COLUMNS = (
    list(string.ascii_uppercase),
    *([f"{stem}{end}" for end in string.ascii_lowercase] for stem in ("choice_", "option_")),
    *(
        [f"{stem}{number}" for number in range(first, 10)]
        for stem, first in (("choice", 1), ("choice_", 1), ("option", 1), ("option_", 1))
    ),
)


@register_task
class MultipleChoiceTask(ColumnTask):
    """Chooses one of a row's own answers, the likeliest.

    The choices are a list (in CSV a JSON list), ARC's `{"text": [...], "label": [...]}`, or stand
    in a column each, of which a row with fewer leaves the last ones empty. The right one is named
    by its text, its letter (A = the first; ARC: its label), or, as in MMLU, by an integer, counted
    from 0.

    Attributes:
        choices_column: column with the choices.
        choices_columns: a column for each choice instead; where neither is there, the usual names
            are looked for (`A`, `B`, ...; `choice_a`; `option_a`; `choice1`; ...).
    """

    name = "multiple_choice"
    description = "One of a row's own choices for each question"
    primary_metric = "accuracy"
    per_row_choices = True

    instruction = "Answer the question with one of the choices, to the letter:"
    text_column = "question"
    choices_column: str = "choices"
    choices_columns: Sequence[str] | None = None

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        choices_column: str | None = None,
        choices_columns: Sequence[str] | None = None,
        label_column: str | None = None,
    ) -> None:
        super().__init__(
            instruction=instruction, text_column=text_column, label_column=label_column
        )
        self.settle({"choices_column": choices_column})
        if choices_columns is None:
            return
        names = [] if isinstance(choices_columns, str) else list(choices_columns)
        if len(names) < 2 or not all(isinstance(name, str) and name.strip() for name in names):
            raise ArgumentError(
                f"choices_columns must be a list of two columns or more, not {choices_columns!r}."
            )
        self.choices_columns = names

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Self:
        """A copy with the columns of the choices settled, after every row has been checked."""
        task = self._settled(table)
        return super(MultipleChoiceTask, task).bind(
            table, with_labels=with_labels, for_training=for_training
        )

    def bad_rows(self, table: pd.DataFrame, *, with_labels: bool = True) -> pd.Series:
        """As in the base class, with the columns of the choices settled."""
        return super(MultipleChoiceTask, self._settled(table)).bad_rows(
            table, with_labels=with_labels
        )

    def input_columns(self) -> Sequence[str]:
        """Question and choices."""
        if self.choices_columns is None:
            return self.text_column, self.choices_column
        return self.text_column, *self.choices_columns

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """Choices that are none, or an answer that is not among them."""
        choices, _ = self._choices(row)
        column = f"column {self.choices_column!r}"
        if self.choices_columns is not None:
            column = f"columns {', '.join(map(repr, self.choices_columns))}"
        elif not choices:
            return f"{column} holds no list of choices"
        if len(choices) < 2 or "" in choices or len(set(choices)) < len(choices):
            return f"{column} needs two choices or more, none empty or twice: {choices}"
        for name in (self.text_column, *((self.label_column,) if with_labels else ())):
            if not cell_text(row[name]).strip():
                return f"nothing in column {name!r}"
        if with_labels and self._right(row) is None:
            given = cell_text(row[self.label_column])
            return f"column {self.label_column!r}: {given!r} is none of the choices {choices}"
        return None

    def placeholder_row(self) -> Mapping[str, Any]:
        """The question, and two choices."""
        choices = ["{choice 1}", "{choice 2}"]
        row = {**super().placeholder_row(), self.choices_column: choices}
        if self.choices_columns is not None:
            row |= dict.fromkeys(self.choices_columns, "")
            row |= dict(zip(self.choices_columns, choices, strict=False))
        return row

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The question with its choices, a line each, and the cue for the answer."""
        choices = "".join(f"\n- {choice}" for choice in self._choices(row)[0])
        before = f"Instruction: {self.instruction}\nQuestion: "
        question = cell_text(row[self.text_column])
        return Prompt(before, question, "\nAnswer:", tail=f"\nChoices:{choices}")

    def build_choices(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Every choice, after a space."""
        return tuple(f" {choice}" for choice in self._choices(row)[0])

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The right choice, after a space."""
        return f" {self._right(row)}"

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """The share of right choices."""
        return self.answer_kind.metrics(targets, predictions)

    def _settled(self, table: pd.DataFrame) -> Self:
        """A copy that reads the columns which the table has."""
        task = copy.copy(self)
        if self.choices_columns is None and self.choices_column not in table.columns:
            found = (
                list(itertools.takewhile(lambda name: name in table.columns, names))
                for names in _USUAL_COLUMNS
            )
            task.choices_columns = next((names for names in found if len(names) > 1), None)
        return task

    def _choices(self, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The choices and their letters; none if the cell holds no list."""
        if self.choices_columns is not None:
            texts = [cell_text(row[name]).strip() for name in self.choices_columns]
            while texts and not texts[-1]:
                texts.pop()
            return texts, list(string.ascii_uppercase)
        cell = cell_value(row[self.choices_column])
        letters: Sequence[object] = string.ascii_uppercase
        if isinstance(cell, dict):
            letters, cell = cell.get("label") or letters, cell.get("text")
        if not isinstance(cell, list):
            return [], []
        return [cell_text(choice).strip() for choice in cell], [str(one) for one in letters]

    def _right(self, row: Mapping[str, Any]) -> str | None:
        choices, letters = self._choices(row)
        answer = cell_value(row[self.label_column])
        text = cell_text(answer).strip()
        if text in choices:
            return text
        if isinstance(answer, float) and answer.is_integer():  # pandas', beside missing values
            answer = int(answer)
        elif text.isdecimal() and text not in letters[: len(choices)]:  # CSV has text only
            answer = int(text)
        if isinstance(answer, int) and not any(choice.isdecimal() for choice in choices):
            return choices[answer] if 0 <= answer < len(choices) else None
        named = dict(zip(letters, choices, strict=False))
        return named.get(text, named.get(text.upper()))
