"""Conversations in the `messages` format, laid out by the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_fsdp.tasks.cells import cell_value
from lora_fsdp.tasks.example import Prompt
from lora_fsdp.tasks.generation import GenerationTask
from lora_fsdp.tasks.registry import register_task

_ROLES = ("system", "user", "assistant")


@register_task
class ChatTask(GenerationTask):
    """Answers the last user's message of a conversation; needs `--chat_template true`.

    A row is a list of `{"role": ..., "content": ...}`. What is learnt is the last message, which is
    the assistant's; earlier ones of the assistant are context. To predict, it may be missing.
    """

    name = "chat"
    description = "Conversations (a column of messages), by the model's chat template"

    instruction = ""  # the conversation says it all
    text_column = "messages"

    def __init__(self, *, text_column: str | None = None) -> None:
        super().__init__(text_column=text_column)

    def answer_columns(self) -> Sequence[str]:
        """None: the answer is the last message."""
        return ()

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """Messages that are none, or in an order that cannot be learnt from."""
        messages, column = self._messages(row), f"column {self.text_column!r}"
        if not messages:
            return f'{column} holds no list of {{"role": ..., "content": ...}} with texts in both'
        if unknown := [role for role, _ in messages if role not in _ROLES]:
            return f"{column} has the role {unknown[0]!r}; known are {', '.join(_ROLES)}"
        if with_labels and (messages[-1][0] != "assistant" or not messages[-1][1].strip()):
            return f"{column} does not end with an answer of the assistant"
        asked = _asked(messages)
        if not asked or asked[-1][0] != "user" or not asked[-1][1].strip():
            return f"{column} has no message of the user right before the answer"
        return None

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The last message of the user, with those before it as turns."""
        *turns, (_, text) = _asked(self._messages(row)) or [("user", "")]
        return Prompt("", text, "", turns=tuple(turns))

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The assistant's last message."""
        return self._messages(row)[-1][1].strip()

    def _messages(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(role, content) of every message; a plain text is a user's; empty if malformed."""
        cell = cell_value(row[self.text_column])
        if isinstance(cell, str):
            return [("user", cell)]
        try:
            messages = [(message["role"], message["content"]) for message in cell]
        except (TypeError, LookupError):
            return []
        texts = all(isinstance(part, str) for message in messages for part in message)
        return messages if texts else []


def _asked(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The messages without the answer."""
    return messages[:-1] if messages and messages[-1][0] == "assistant" else messages
