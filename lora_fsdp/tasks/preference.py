"""Which of two texts is better, from preference data in TRL's form."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple, Self

import pandas as pd

from lora_fsdp.errors import ArgumentError, MalformedRowError
from lora_fsdp.tasks.answers.pairs import Pairs
from lora_fsdp.tasks.cells import cell_text, cell_value
from lora_fsdp.tasks.chat import message_of
from lora_fsdp.tasks.columns import ColumnTask
from lora_fsdp.tasks.example import Prompt
from lora_fsdp.tasks.registry import register_task

_Turns = tuple[tuple[str, str], ...]


class _Pair(NamedTuple):
    """A row: messages before the last one, the last one, and its two answers."""

    turns: _Turns
    prompt: str
    chosen: str
    rejected: str


@register_task
class PreferenceTask(ColumnTask):
    """Learns to prefer the chosen one of two answers to a prompt, by the DPO objective.

    Rows are in TRL's preference format: `prompt`, `chosen` and `rejected` as texts or as lists of
    messages (in CSV as JSON); without the prompt's column, it is what both begin with.

    Attributes:
        instruction: stands before the prompt, with the frame that classifications have; "" = the
            prompt as it is, which an answer continues to the letter.
        chosen_column, rejected_column: the two answers.
        beta: the objective's.
    """

    name = "preference"
    description = "The better one of two answers (prompt, chosen, rejected), by DPO"
    primary_metric = "accuracy"
    per_row_choices = True

    instruction = ""
    text_column = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    beta: float = 0.1
    _has_prompt = True

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        chosen_column: str | None = None,
        rejected_column: str | None = None,
        beta: float | None = None,
    ) -> None:
        # An empty instruction is one that was saved.
        super().__init__(instruction=instruction or None, text_column=text_column)
        self.settle({"chosen_column": chosen_column, "rejected_column": rejected_column})
        if beta is None:
            return
        is_number = isinstance(beta, int | float) and not isinstance(beta, bool)
        if not is_number or not math.isfinite(beta) or beta <= 0:
            raise ArgumentError(f"beta must be a number above 0, not {beta!r}.")
        self.beta = float(beta)

    @property
    def answer_kind(self) -> Pairs:
        """Two texts."""
        return Pairs(self.beta)

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Self:
        """A copy that knows whether there is a column of prompts, after every row was checked."""
        task = copy.copy(self)
        task._has_prompt = self.text_column in table.columns
        return super(PreferenceTask, task).bind(
            table, with_labels=with_labels, for_training=for_training
        )

    def input_columns(self) -> Sequence[str]:
        """The two answers."""
        return self.chosen_column, self.rejected_column

    def optional_columns(self) -> Sequence[str]:
        """The prompt's."""
        return (self.text_column,)

    def answer_columns(self) -> Sequence[str]:
        """None: which of the two is better, their columns' names say."""
        return ()

    def split_columns(self) -> tuple[str | None, str | None]:
        """Pairs of one prompt stay together."""
        return (self.text_column if self._has_prompt else self.chosen_column), None

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """A prompt or an answer that is none, or two answers that are the same."""
        pair = self._read(row)
        return pair if isinstance(pair, str) else None

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt, or the last message of the user with those before it as turns."""
        pair = self._pair(row)
        if not self.instruction:
            return Prompt("", pair.prompt, "", turns=pair.turns)
        before = f"Instruction: {self.instruction}\nInput: "
        return Prompt(before, pair.prompt, "\nOutput:", turns=pair.turns)

    def build_choices(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The chosen answer and the rejected one."""
        pair = self._pair(row)
        return self._continuing(pair.chosen), self._continuing(pair.rejected)

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The chosen answer."""
        return self._continuing(self._pair(row).chosen)

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """See `Pairs.metrics`."""
        return self.answer_kind.metrics(targets, predictions)

    def _continuing(self, answer: str) -> str:
        return f" {answer.strip()}" if self.instruction else answer

    def _pair(self, row: Mapping[str, Any]) -> _Pair:
        pair = self._read(row)
        if isinstance(pair, str):
            raise MalformedRowError(f"A row of task {self.name!r} cannot be used: {pair}.")
        return pair

    def _read(self, row: Mapping[str, Any]) -> _Pair | str:
        """The pair in a row, or what is wrong with it."""
        chosen, rejected = (cell_value(row[name]) for name in self.input_columns())
        given = cell_value(row.get(self.text_column))
        if isinstance(chosen, list) != isinstance(rejected, list):
            return f"columns {self.chosen_column!r} and {self.rejected_column!r} differ in form"
        if isinstance(chosen, list):
            found = self._of_messages(given, chosen, rejected)
        else:
            prompt = None if given is None else cell_text(given)
            found = _of_texts(prompt, cell_text(chosen), cell_text(rejected))
        if isinstance(found, str):
            return found
        for name, text in zip(self.input_columns(), found[2:], strict=True):
            if not text.strip():
                return f"nothing in column {name!r}"
        if not found.prompt.strip():
            where = f"column {self.text_column!r}"
            return (
                f"nothing in {where}"
                if given is not None
                else (f"no prompt: there is no {where}, and the two answers do not begin alike")
            )
        if found.chosen.strip() == found.rejected.strip():
            return f"columns {self.chosen_column!r} and {self.rejected_column!r} are the same"
        return found

    def _of_messages(self, given: object, chosen: list[Any], rejected: list[Any]) -> _Pair | str:
        lists = []
        for name, cell in zip(self.input_columns(), (chosen, rejected), strict=True):
            messages = [message_of(one) for one in cell]
            if not messages or None in messages:
                return f"column {name!r} holds no list of messages with role and content"
            lists.append([one for one in messages if one is not None])
        first, second = lists
        before = _messages_before(given)
        if before is None:
            return f"column {self.text_column!r} holds neither a text nor a list of messages"
        if not before:
            before = list(commonprefix([first, second]))  # noqa: RUF071
            first, second = first[len(before) :], second[len(before) :]
        roles = [[role for role, _ in messages] for messages in (first, second)]
        if roles != [["assistant"], ["assistant"]] or before[-1:] == [] or before[-1][0] != "user":
            return (
                f"columns {self.chosen_column!r} and {self.rejected_column!r} must each hold one "
                "message of the assistant after the same conversation, which ends with the user's"
            )
        return _Pair(tuple(before[:-1]), before[-1][1], first[0][1], second[0][1])


def _of_texts(given: str | None, chosen: str, rejected: str) -> _Pair:
    """Where there is no prompt, it is what both begin with, as TRL's `extract_prompt` has it."""
    if given is not None:
        return _Pair((), given, chosen, rejected)
    shared = len(commonprefix([chosen, rejected]))  # noqa: RUF071 (of any sequences)
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    return _Pair((), chosen[:shared], chosen[shared:], rejected[shared:])


def _messages_before(given: object) -> list[tuple[str, str]] | None:
    """The prompt's messages; none if there is no prompt, `None` if it is no prompt."""
    if given is None:
        return []
    if isinstance(given, str):
        return [("user", given)]
    messages = [message_of(one) for one in given] if isinstance(given, list) else [None]
    return None if None in messages else [one for one in messages if one is not None]
