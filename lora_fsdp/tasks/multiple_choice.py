"""Questions whose rows bring their own answers to choose from."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from lora_fsdp.tasks.base import Prompt
from lora_fsdp.tasks.cells import cell_text, cell_value
from lora_fsdp.tasks.columns import ColumnTask
from lora_fsdp.tasks.registry import register_task


@register_task
class MultipleChoiceTask(ColumnTask):
    """Chooses one of a row's own answers, the likeliest.

    The choices are a list (in CSV a JSON list), or ARC's `{"text": [...], "label": [...]}`. The
    right one is named by its text, its letter (A = the first; ARC: its label), or, as in MMLU, by
    an integer, counted from 0.

    Attributes:
        choices_column: column with the choices.
    """

    name = "multiple_choice"
    description = "One of a row's own choices for each question"
    primary_metric = "accuracy"
    per_row_choices = True

    instruction = "Answer the question with one of the choices, to the letter:"
    text_column = "question"
    choices_column: str = "choices"

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        choices_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        super().__init__(
            instruction=instruction, text_column=text_column, label_column=label_column
        )
        self.settle({"choices_column": choices_column})

    def input_columns(self) -> Sequence[str]:
        """Question and choices."""
        return self.text_column, self.choices_column

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """Choices that are none, or an answer that is not among them."""
        choices, _ = self._choices(row)
        column = f"column {self.choices_column!r}"
        if not choices:
            return f"{column} holds no list of choices"
        if len(choices) < 2 or "" in choices or len(set(choices)) < len(choices):
            return f"{column} needs two choices or more, none empty or twice: {choices}"
        found = super().fault(row, with_labels=with_labels)
        if found is None and with_labels and self._right(row) is None:
            given = cell_text(row[self.label_column])
            return f"column {self.label_column!r}: {given!r} is none of the choices {choices}"
        return found

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
        right = [target == choice for target, choice in zip(targets, predictions, strict=True)]
        return {"accuracy": sum(right) / len(right)}

    def _choices(self, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The choices and their letters; none if the cell holds no list."""
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
        if isinstance(answer, float) and answer.is_integer():  # pandas', beside missing values
            answer = int(answer)
        if isinstance(answer, int) and not any(choice.isdecimal() for choice in choices):
            return choices[answer] if 0 <= answer < len(choices) else None
        named = dict(zip(letters, choices, strict=False))
        return text if text in choices else named.get(text)
