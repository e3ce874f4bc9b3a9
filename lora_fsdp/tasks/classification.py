"""Classification of the rows of a table: one text column, one label column, a closed label set."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pandas as pd

from lora_fsdp.errors import (
    ArgumentError,
    ColumnNotFoundError,
    EmptyTextError,
    IncompleteTaskError,
    MalformedRowError,
    NoRowsError,
    SingleLabelError,
    UnknownLabelError,
)
from lora_fsdp.tasks.answers import ClosedSet
from lora_fsdp.tasks.base import Task
from lora_fsdp.tasks.cells import (
    cell_text,
    first_faults,
    label_fault,
    label_text,
    nearest_columns,
    text_fault,
)
from lora_fsdp.tasks.example import TEXT_PLACEHOLDER, Prompt
from lora_fsdp.tasks.guessing import Guess, guess_label_column, guess_text_column
from lora_fsdp.tasks.registry import register_task
from lora_fsdp.tasks.renaming import check_known

_NO_TEXT = "no text"
_NO_LABEL = "no label"
# How the fault of a cell begins that is neither a text nor a label.
_UNREADABLE = "column "
_HOW_TO_DROP = "Correct them, or leave them out with --on_bad_rows drop."


@register_task
class ClassificationTask(Task):
    """Classifies the rows of a table. Complete as it is; subclasses only set class attributes.

    Every class attribute below is also a constructor argument, which wins unless it is `None`.

    Attributes:
        instruction: what the model is told to do with the text.
        text_column: column with the text to classify.
        label_column: column with the right answer.
        labels: the label set; `None` = the labels that occur in the table, sorted.
        layouts: (text column, label column) pairs, tried in order for what is not named above.
    """

    name = "classification"
    description = "One label for each text of a table; columns and labels named or read from it"
    primary_metric = "macro_f1"

    instruction: str = (
        "Classify the following text. Output exactly one label, with no punctuation or extra text:"
    )
    text_column: str | None = None
    label_column: str | None = None
    labels: Sequence[str] | None = None
    layouts: Sequence[tuple[str, str]] = ()

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        labels: Sequence[str] | None = None,
        layouts: Sequence[tuple[str, str]] | None = None,
        label_names: Mapping[str, str] | None = None,
    ) -> None:
        texts = {"instruction": instruction, "text_column": text_column}
        for option, value in {**texts, "label_column": label_column}.items():
            if not isinstance(value, str | None):
                raise ArgumentError(f"{option} must be a text, not {str(value)[:80]!r}.")
        if isinstance(labels, str | bytes) or not isinstance(labels, Sequence | None):
            raise ArgumentError(f"labels must be a list of labels, not {str(labels)[:80]!r}.")
        self.instruction = self.instruction if instruction is None else instruction
        self.text_column = self.text_column if text_column is None else text_column
        self.label_column = self.label_column if label_column is None else label_column
        self.layouts = self.layouts if layouts is None else layouts
        labels = self.labels if labels is None else labels
        for fault in filter(None, map(label_fault, labels or ())):
            raise ArgumentError(f"labels must be a list of labels, but one is {fault}.")
        self.labels = None if labels is None else tuple(label_text(label) for label in labels)
        if not isinstance(label_names, Mapping | None):
            raise ArgumentError(f"label_names must be a mapping, not {str(label_names)[:80]!r}.")
        # Learnt under another name than the table's.
        self.label_names = {str(old): str(new) for old, new in (label_names or {}).items()}

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Self:
        """A copy with columns and labels settled, after every row has been checked.

        Args:
            table: the rows; their index gives the row numbers in messages.
            with_labels: `False` for a table to predict, which needs no label column.
            for_training: `False` for a table to evaluate on, where one label is no mistake.

        Raises:
            NoRowsError, ColumnNotFoundError, EmptyTextError, UnknownLabelError, SingleLabelError:
                the table does not fit.
            IncompleteTaskError: instruction or columns are neither set nor known from a layout.
        """
        if not self.instruction.strip():
            raise IncompleteTaskError(f"Task {self.name!r} has no instruction: set one.")
        if len(table) == 0:
            raise NoRowsError(f"Task {self.name!r} was given a table without rows.")
        task = self._with_columns(table, with_labels=with_labels)
        task._refuse_bad_rows(table, with_labels=with_labels)
        if with_labels:
            found = sorted({task._label(value) for value in table[task.label_column]})
            if for_training and task.label_names:
                there = {label_text(value) for value in table[task.label_column]}
                check_known(task.label_names, there, column=str(task.label_column))
            if for_training and len(found) < 2:
                raise SingleLabelError(
                    f"All {len(table)} rows have the label {found[0]!r} (column "
                    f"{task.label_column!r}): there is nothing to learn. Take rows of at least two "
                    "labels; the first rows of a sorted file are a common cause."
                )
            task.labels = tuple(found) if task.labels is None else task.labels
        return task

    @property
    def answer_kind(self) -> ClosedSet:
        """A closed set, also before the labels are read from a table."""
        return self._closed_set()

    def split_columns(self) -> tuple[str | None, str | None]:
        """Text and label column."""
        return self.text_column, self.label_column

    def options(self) -> dict[str, Any]:
        """Instruction, columns and labels."""
        return {
            "instruction": self.instruction,
            "text_column": self.text_column,
            "label_column": self.label_column,
            "labels": None if self.labels is None else list(self.labels),
            **({"label_names": self.label_names} if self.label_names else {}),
        }

    def facts(self) -> dict[str, Any]:
        """The options, and the layouts."""
        return {**self.options(), "layouts": [list(pair) for pair in self.layouts]}

    def bad_rows(self, table: pd.DataFrame, *, with_labels: bool = True) -> pd.Series:
        """What is wrong with each row that cannot be used: "no text", "no label" or which label.

        Returns:
            A string for each bad row, under the row's index in `table`; empty if all are good.
        """
        task = self._with_columns(table, with_labels=with_labels)
        faults = pd.Series("", index=table.index, name="fault", dtype="str")
        if with_labels:
            cells = table[task.label_column]
            labels = pd.Series(list(map(task._label, cells)), table.index, dtype="str")
            faults[labels == ""] = _NO_LABEL
            if task.labels is not None:
                unknown = (labels != "") & ~labels.isin(task.labels)
                faults[unknown] = "label " + labels[unknown].map(repr)
            for place, fault in enumerate(map(label_fault, cells)):
                if fault:
                    faults.iloc[place] = f"{_UNREADABLE}{task.label_column!r} holds {fault}"
        for place, cell in enumerate(table[task.text_column]):
            if fault := text_fault(cell):
                faults.iloc[place] = f"{_UNREADABLE}{task.text_column!r} holds {fault}"
            elif not cell_text(cell).strip():
                faults.iloc[place] = _NO_TEXT
        return faults[faults != ""]

    def input_fault(self, row: Mapping[str, Any]) -> str | None:
        """A text that is none."""
        fault = text_fault(row[str(self.text_column)])
        return None if fault is None else f"{_UNREADABLE}{self.text_column!r} holds {fault}"

    def placeholder_row(self) -> Mapping[str, Any]:
        """`{text}` for the text."""
        return {str(self.text_column): TEXT_PLACEHOLDER}

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The article's format: instruction, input, and the cue for the answer."""
        if self.text_column is None:
            raise IncompleteTaskError(f"Task {self.name!r} has no text column: bind(table) first.")
        return Prompt(
            before=f"Instruction: {self.instruction}\nInput: ",
            text=cell_text(row[self.text_column]),
            after="\nOutput:",
        )

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The row's label, after a space."""
        if self.label_column is None:
            raise IncompleteTaskError(f"Task {self.name!r} has no label column: bind(table) first.")
        return self.target_of(self._label(row[self.label_column]))

    def parse(self, text: str) -> str | None:
        """The label that the first line of `text` starts with, in the label set's spelling.

        Case, quotes and punctuation around it do not matter, nor do words after it; a label that
        comes only after other words ("not positive") is no answer.
        """
        line = text.strip().partition("\n")[0]
        matches = [label for label in self._label_set() if _starts_with(label, line)]
        # Of "very positive" and "very" the longer is meant; of "US" and "us" the one as written.
        return max(matches, key=lambda label: (len(label), label in line), default=None)

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """See `ClosedSet.metrics`."""
        self._label_set()
        return self.answer_kind.metrics(targets, predictions)

    def confusion_matrix(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> pd.DataFrame:
        """Counts of rows, true label by predicted label, and a column "(none)" where needed."""
        self._label_set()
        return self.answer_kind.confusion_matrix(targets, predictions)

    def _label(self, cell: object) -> str:
        """A cell's label, by the name under which it is learnt."""
        text = label_text(cell)
        return self.label_names.get(text, text)

    def _with_columns(self, table: pd.DataFrame, *, with_labels: bool) -> Self:
        """A copy with the columns that `table` has, of those given or known."""
        layouts: Sequence[tuple[str | None, str | None]] = self.layouts or ((None, None),)
        pairs = [(self.text_column or text, self.label_column or label) for text, label in layouts]
        for text, label in pairs:
            if text in table.columns and (label in table.columns or not with_labels):
                task = copy.copy(self)
                task.text_column, task.label_column = text, label
                return task
        wanted = [pair if with_labels else pair[:1] for pair in pairs]
        columns = [str(column) for column in table.columns]
        if self.text_column is not None and self.text_column not in columns:
            raise _column_error(self.name, wanted, columns)
        if self.label_column is not None and self.label_column not in columns:
            raise _column_error(self.name, wanted, columns)
        if not with_labels:  # to predict, a task is told by its training
            raise _column_error(self.name, wanted, columns)
        return self._with_guessed_columns(table, wanted)

    def _with_guessed_columns(
        self, table: pd.DataFrame, wanted: Sequence[Sequence[str | None]]
    ) -> Self:
        """A copy with the columns that the table makes plain, where nobody has named them."""
        task = copy.copy(self)
        found: list[tuple[str, Guess]] = []
        unknown: list[tuple[str, Guess]] = []
        if task.text_column is None:
            guess = guess_text_column(table, besides=[task.label_column])
            task.text_column = guess.column
            (unknown if guess.column is None else found).append(("text", guess))
        if task.label_column is None:
            guess = guess_label_column(table, besides=[task.text_column])
            task.label_column = guess.column
            (unknown if guess.column is None else found).append(("label", guess))
        if unknown:
            columns = [str(column) for column in table.columns]
            error = _column_error(self.name, wanted, columns)
            fitting = [f"{what}: {one.reason}" for what, one in unknown if one.reason[:2] == "it"]
            raise type(error)(" ".join([str(error), *(f"For the {one}." for one in fitting)]))
        columns_found = " and ".join(f"{w} is {g.column!r} ({g.reason})" for w, g in found)
        task.guessed = (
            f"{columns_found}; if that is wrong, name them with --text_column and --label_column"
        )
        return task

    def _refuse_bad_rows(self, table: pd.DataFrame, *, with_labels: bool) -> None:
        bad = self.bad_rows(table, with_labels=with_labels)
        unreadable = bad[bad.str.startswith(_UNREADABLE)]
        if len(unreadable) > 0:
            raise MalformedRowError(
                f"{len(unreadable)} of {len(table)} rows cannot be used: "
                f"{first_faults(unreadable)}. {_HOW_TO_DROP}"
            )
        empty = bad[bad == _NO_TEXT]
        if len(empty) > 0:
            raise EmptyTextError(
                f"{len(empty)} of {len(table)} rows have no text in column {self.text_column!r}: "
                f"{first_faults(empty)}. {_HOW_TO_DROP}"
            )
        if len(bad) > 0:
            known = "" if self.labels is None else f", or none of {_listed(self.labels)}"
            raise UnknownLabelError(
                f"{len(bad)} of {len(table)} rows have no label in column {self.label_column!r}"
                f"{known}: {first_faults(bad)}. {_HOW_TO_DROP}"
            )

    def _label_set(self) -> Sequence[str]:
        if self.labels is None:
            raise IncompleteTaskError(
                f"Task {self.name!r} has no label set: bind(table) reads it, or pass labels."
            )
        return self.labels


def _starts_with(label: str, line: str) -> bool:
    """Whether `line` is `label`, give or take case, punctuation around it and words after it."""
    # A sign may belong to the answer ("-1" is not "1"), and so may decimals ("1.5").
    pattern = rf"(?:[^\w+-]|-\s)*{re.escape(label)}(?!\w|-\w|[.,]\d)"
    return re.match(pattern, line, flags=re.IGNORECASE) is not None


def _column_error(
    task: str, wanted: Sequence[Sequence[str | None]], columns: Sequence[str]
) -> IncompleteTaskError | ColumnNotFoundError:
    advice = "Name them with --text_column and --label_column."
    if any(None in names for names in wanted):
        return IncompleteTaskError(
            f"Task {task!r} does not know which columns to read. {advice} "
            f"The table has {_listed(columns)}."
        )
    missing = [str(name) for names in wanted for name in names if name not in columns]
    choices = dict.fromkeys(" and ".join(map(repr, names)) for names in wanted)
    return ColumnNotFoundError(
        f"Task {task!r} needs {', or '.join(choices)}, but the columns of the table are "
        f"{_listed(columns)}. {' '.join([*nearest_columns(missing, columns), advice])}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
