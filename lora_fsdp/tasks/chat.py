"""Conversations in the `messages` format, laid out by the model's own chat template."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pandas as pd

from lora_fsdp.tasks.cells import cell_text, cell_value
from lora_fsdp.tasks.example import TEXT_PLACEHOLDER, Prompt
from lora_fsdp.tasks.generation import GenerationTask
from lora_fsdp.tasks.registry import register_task
from lora_fsdp.tasks.thinking import without_reasoning

_ROLES = ("system", "user", "assistant")
# Who speaks, as ShareGPT's form and its relatives call them.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_SHAREGPT_COLUMN, _SYSTEM_COLUMN = "conversations", "system"


@register_task
class ChatTask(GenerationTask):
    """Answers the last user's message of a conversation; needs `--chat_template true`.

    A row is a list of `{"role": ..., "content": ...}`, where a content may be a list of text parts
    (`{"type": "text", "text": ...}`); or ShareGPT's list of `{"from": ..., "value": ...}`, which
    may also stand in the column `conversations`, with a system message in a column `system`. What
    is learnt is the last message, which is the assistant's; earlier ones of the assistant are
    context. To predict, it may be missing.
    """

    name = "chat"
    description = "Conversations (a column of messages), by the model's chat template"

    instruction = ""  # the conversation says it all
    text_column = "messages"

    def __init__(self, *, text_column: str | None = None) -> None:
        super().__init__(text_column=text_column)

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Self:
        """A copy with the column of the conversations settled, after every row was checked."""
        task = self._settled(table)
        return super(ChatTask, task).bind(table, with_labels=with_labels, for_training=for_training)

    def bad_rows(self, table: pd.DataFrame, *, with_labels: bool = True) -> pd.Series:
        """What is wrong with each row, in the column that the table has."""
        return super(ChatTask, self._settled(table)).bad_rows(table, with_labels=with_labels)

    def _settled(self, table: pd.DataFrame) -> Self:
        task = copy.copy(self)
        unnamed = self.text_column == type(self).text_column
        if unnamed and self.text_column not in table.columns and _SHAREGPT_COLUMN in table.columns:
            task.text_column = _SHAREGPT_COLUMN
        return task

    def optional_columns(self) -> Sequence[str]:
        """A system message's, in ShareGPT's form."""
        return (_SYSTEM_COLUMN,)

    def answer_columns(self) -> Sequence[str]:
        """None: the answer is the last message."""
        return ()

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """Messages that are none, or in an order that cannot be learnt from."""
        column = f"column {self.text_column!r}"
        cell = cell_value(row[self.text_column])
        if isinstance(cell, list) and (kinds := _kinds_of_other_parts(cell)):
            return f"{column} has a part of type {kinds[0]!r}; only texts can be learnt from"
        messages = self._messages(row)
        if not messages:
            return (
                f'{column} holds no list of {{"role": ..., "content": ...}}, or of {{"from": ..., '
                '"value": ...}, with texts in both'
            )
        if unknown := [role for role, _ in messages if role not in _ROLES]:
            return f"{column} has the role {unknown[0]!r}; known are {', '.join(_ROLES)}"
        if with_labels and (messages[-1][0] != "assistant" or not messages[-1][1].strip()):
            return f"{column} does not end with an answer of the assistant"
        asked = _asked(messages)
        if not asked or asked[-1][0] != "user" or not asked[-1][1].strip():
            return f"{column} has no message of the user right before the answer"
        return None

    def placeholder_row(self) -> Mapping[str, Any]:
        """A conversation of one message: a plain text is the user's."""
        return {self.text_column: TEXT_PLACEHOLDER}

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The last message of the user, with those before it as turns."""
        *turns, (_, text) = _asked(self._messages(row)) or [("user", "")]
        return Prompt("", text, "", turns=tuple(turns))

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The assistant's last message."""
        return self._messages(row)[-1][1].strip()

    def parse(self, text: str) -> str | None:
        """The answer behind the reasoning, where there is any."""
        return without_reasoning(text).strip() or None

    def score_answer(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Of the answers alone: two ways of thinking to the same answer are equally right."""
        return super().score_answer(answer, [without_reasoning(right) for right in references])

    def _messages(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(role, content) of every message; a plain text is a user's; empty if malformed."""
        cell = cell_value(row[self.text_column])
        if isinstance(cell, str):
            return [("user", cell)]
        found = [message_of(one) for one in cell] if isinstance(cell, list) else []
        messages = [message for message in found if message is not None]
        if len(messages) < len(found):
            return []
        system = cell_text(row.get(_SYSTEM_COLUMN)).strip() if _is_sharegpt(cell) else ""
        if not system or not messages or messages[0][0] == "system":
            return messages
        return [("system", system), *messages]


def _is_sharegpt(cell: object) -> bool:
    return isinstance(cell, list) and all(
        isinstance(message, dict) and message.get("from") is not None for message in cell
    )


def message_of(message: object) -> tuple[str, str] | None:
    """(role, content) of one message in either form; `None` if it is neither."""
    if not isinstance(message, dict):
        return None
    role, content = message.get("role"), message.get("content")
    if role is None and content is None:  # Parquet has all keys in every message
        role, content = message.get("from"), message.get("value")
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if isinstance(content, list):
        content = _joined(content)
    return (role, content) if isinstance(role, str) and isinstance(content, str) else None


def _joined(parts: Sequence[object]) -> str | None:
    """The text of a content's parts, one after another; `None` if one is no text."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if known and len(known) == len(texts) else None


def _kinds_of_other_parts(messages: Sequence[object]) -> list[str]:
    """The types of content parts that are no texts, such as images."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    return [str(kind) for kind in kinds if kind not in (None, "text")]


def _asked(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The messages without the answer."""
    return messages[:-1] if messages and messages[-1][0] == "assistant" else messages
