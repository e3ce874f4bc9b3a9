"""How two texts relate, such as whether one follows from the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import pandas as pd

from lora_fsdp.errors import ArgumentError, ColumnNotFoundError, EmptyTextError
from lora_fsdp.tasks.cells import cell_text, text_fault
from lora_fsdp.tasks.classification import ClassificationTask
from lora_fsdp.tasks.example import Prompt
from lora_fsdp.tasks.registry import register_task

Shorten = Literal["longer", "first", "second"]


@register_task
class InferenceTask(ClassificationTask):
    """One label for a pair of texts.

    Attributes:
        text_column, second_column: columns with the two texts.
        shorten: which of them is cut where a pair is too long; the other one is never shortened.
    """

    name = "inference"
    description = "One label for a pair of texts: entailment, contradiction, paraphrase"

    instruction = (
        "Does the hypothesis follow from the premise? Output exactly one label, with no "
        "punctuation or extra text:"
    )
    text_column = "premise"
    second_column: str = "hypothesis"
    label_column = "label"
    shorten: Shorten = "longer"

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        second_column: str | None = None,
        label_column: str | None = None,
        labels: Sequence[str] | None = None,
        shorten: Shorten | None = None,
    ) -> None:
        super().__init__(
            instruction=instruction,
            text_column=text_column,
            label_column=label_column,
            labels=labels,
        )
        self.second_column = self.second_column if second_column is None else second_column
        self.shorten = self.shorten if shorten is None else shorten
        if self.shorten not in get_args(Shorten):
            raise ArgumentError(f"shorten must be longer, first or second, not {self.shorten!r}.")

    def options(self) -> dict[str, Any]:
        """Instruction, columns, labels, and which text is cut."""
        own = {"second_column": self.second_column, "shorten": self.shorten}
        return {**super().options(), **own}

    def bad_rows(self, table: pd.DataFrame, *, with_labels: bool = True) -> pd.Series:
        """As in the base class; a row without the second text is bad, too."""
        bad = super().bad_rows(table, with_labels=with_labels)
        if self.second_column not in table.columns:
            there = ", ".join(map(repr, table.columns))
            raise ColumnNotFoundError(
                f"Task {self.name!r} needs {self.second_column!r}, but the columns of the table "
                f'are {there}. Name it with --task_options \'{{"second_column": "..."}}\'.'
            )
        faults = [self._second_fault(cell) or "" for cell in table[self.second_column]]
        more = pd.Series(faults, table.index, dtype="str")
        return pd.concat([bad, more[(more != "") & ~table.index.isin(bad.index)]]).sort_index()

    def _second_fault(self, cell: object) -> str | None:
        if fault := text_fault(cell):
            return f"column {self.second_column!r} holds {fault}"
        return None if cell_text(cell).strip() else self._no_second()

    def placeholder_row(self) -> Mapping[str, Any]:
        """`{text}` for the first text, the second column's name for the other."""
        return {self.second_column: f"{{{self.second_column}}}", **super().placeholder_row()}

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """Premise, hypothesis, and the cue for the answer."""
        first, second = cell_text(row[str(self.text_column)]), cell_text(row[self.second_column])
        before, between = f"Instruction: {self.instruction}\nPremise: ", "\nHypothesis: "
        longer_is_first = len(first) >= len(second)
        if {"first": True, "second": False}.get(self.shorten, longer_is_first):
            return Prompt(before, first, "\nOutput:", tail=f"{between}{second}")
        return Prompt(before, second, "\nOutput:", lead=f"{first}{between}")

    def split_columns(self) -> tuple[str | None, str | None]:
        """Pairs of one first text stay together."""
        return self.text_column, self.label_column

    def _refuse_bad_rows(self, table: pd.DataFrame, *, with_labels: bool) -> None:
        bad = self.bad_rows(table, with_labels=with_labels)
        empty = bad[bad == self._no_second()]
        if len(empty) > 0:
            rows = ", ".join(f"row {number}" for number in empty.index[:5])
            raise EmptyTextError(
                f"{len(empty)} of {len(table)} rows have {self._no_second()}: {rows}. Correct "
                "them, or leave them out with --on_bad_rows drop."
            )
        super()._refuse_bad_rows(table, with_labels=with_labels)

    def _no_second(self) -> str:
        return f"nothing in column {self.second_column!r}"
