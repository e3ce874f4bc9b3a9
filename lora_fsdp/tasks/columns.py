"""Tasks over named columns of a table, each row checked before it is used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import pandas as pd

from lora_fsdp.errors import (
    ArgumentError,
    ColumnNotFoundError,
    MalformedRowError,
    NoRowsError,
)
from lora_fsdp.tasks.base import Task
from lora_fsdp.tasks.cells import cell_text, first_faults, nearest_columns, records, text_fault
from lora_fsdp.tasks.example import TEXT_PLACEHOLDER, Prompt


class ColumnTask(Task):
    """A task that says which columns it takes, and what is wrong with a row.

    A subclass sets the class attributes and defines `build_prompt`, where more than the text
    belongs into it, and `build_target`. One with further columns takes them in its constructor and
    hands them to `settle`; one that learns something from the table defines `settled_by`.

    Attributes:
        instruction: what the model is told to do.
        text_column: column with the text, the only one that is ever shortened.
        label_column: column with the right answer.
        cue: what stands behind the text.
    """

    cue: ClassVar[str] = "\nOutput:"
    instruction: str = ""
    text_column: str = "text"
    label_column: str = "answer"

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self.settle({"instruction": instruction, "text_column": text_column})
        self.settle({"label_column": label_column})

    def settle(self, given: Mapping[str, object]) -> None:
        """Take over the constructor's arguments that are given; all are texts.

        Raises:
            ArgumentError: one is no text, or empty.
        """
        for name, value in given.items():
            if value is None:
                continue
            if not isinstance(value, str) or not value.strip():
                raise ArgumentError(f"{name} must be a text, not {str(value)[:80]!r}.")
            setattr(self, name, value)

    def input_columns(self) -> Sequence[str]:
        """The columns that a prompt needs."""
        return (self.text_column,)

    def answer_columns(self) -> Sequence[str]:
        """The columns that a target needs beside them."""
        return (self.label_column,)

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """What is wrong with `row`, naming the column, or `None`: here, a cell without text."""
        columns = self._columns(with_labels=with_labels)
        empty = (name for name in columns if not cell_text(row[name]).strip())
        return next((f"nothing in column {name!r}" for name in empty), None)

    def input_fault(self, row: Mapping[str, Any]) -> str | None:
        """A text that is none; of rows that bring their own choices, `fault`.

        Without choices there is nothing to score.
        """
        if self.per_row_choices:
            return self._fault(row, with_labels=False)
        return self._unreadable(row, with_labels=False)

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Self:
        """What `settled_by` makes of it, after every row has been checked.

        Raises:
            NoRowsError, ColumnNotFoundError, MalformedRowError: the table does not fit.
        """
        if len(table) == 0:
            raise NoRowsError(f"Task {self.name!r} was given a table without rows.")
        bad = self.bad_rows(table, with_labels=with_labels)
        if len(bad) > 0:
            raise MalformedRowError(
                f"{len(bad)} of {len(table)} rows cannot be used: {first_faults(bad)}. Correct "
                "them, or leave them out with --on_bad_rows drop."
            )
        return self.settled_by(table) if with_labels else self

    def settled_by(self, table: pd.DataFrame) -> Self:
        """Itself, or a copy with what it learns from checked rows that have labels."""
        return self

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """Instruction, input, and the cue for the answer."""
        before = f"Instruction: {self.instruction}\nInput: "
        return Prompt(before, cell_text(row[self.text_column]), self.cue)

    def split_columns(self) -> tuple[str | None, str | None]:
        """Rows with the same text stay together."""
        return self.text_column, None

    def placeholder_row(self) -> Mapping[str, Any]:
        """`{text}` for the text, and the columns' names for the others that a prompt needs."""
        others = {name: f"{{{name}}}" for name in self.input_columns()}
        return others | {self.text_column: TEXT_PLACEHOLDER}

    def options(self) -> dict[str, Any]:
        """Everything that the constructor takes."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def bad_rows(self, table: pd.DataFrame, *, with_labels: bool = True) -> pd.Series:
        """What is wrong with each row that cannot be used, under its index in `table`."""
        self._check_columns(table, with_labels=with_labels)
        faults = [self._fault(row, with_labels=with_labels) or "" for row in records(table)]
        found = pd.Series(faults, index=table.index, name="fault", dtype="str")
        return found[found != ""]

    def optional_columns(self) -> Sequence[str]:
        """The columns that a prompt takes where they are there."""
        return ()

    def _columns(self, *, with_labels: bool) -> list[str]:
        return [*self.input_columns(), *(self.answer_columns() if with_labels else ())]

    def _fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        unreadable = self._unreadable(row, with_labels=with_labels)
        return unreadable or self.fault(row, with_labels=with_labels)

    def _unreadable(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        for name in (*self._columns(with_labels=with_labels), *self.optional_columns()):
            if fault := text_fault(row.get(name)):
                return f"column {name!r} holds {fault}"
        return None

    def _check_columns(self, table: pd.DataFrame, *, with_labels: bool) -> None:
        there = [str(column) for column in table.columns]
        needed = self._columns(with_labels=with_labels)
        missing = [name for name in needed if name not in there]
        if not missing:
            return
        hints = nearest_columns(missing, there)
        advice = "Name them with --text_column, --label_column or --task_options."
        raise ColumnNotFoundError(
            f"Task {self.name!r} needs {', '.join(map(repr, missing))}, but the columns of the "
            f"table are {', '.join(map(repr, there))}. {' '.join([*hints, advice])}"
        )
