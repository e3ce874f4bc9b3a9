"""A tokenizer's chat template: rendered within limits, with the run's arguments for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_fsdp.data.chat.bounded_templates import render, variables
from lora_fsdp.errors import ArgumentError, MalformedRowError, UnsafeFileError
from lora_fsdp.tasks import Example
from lora_fsdp.tasks.thinking import (
    THINKING,
    empty_block,
    ends_with_block,
    open_block,
    own_block,
)

# Stands in for a text or an answer to find where it comes to stand in a chat template.
MARKER = "qjxtextqjx"
_LONGEST_REASON = 300
# What a template is given by us, and by nobody else.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "chat_template",
             "conversation", "continue_final_message", "tokenize", "return_dict")  # fmt: skip

Turns = Sequence[Mapping[str, str]]


class ChatTemplate:
    """How a tokenizer lays a conversation out, and where its answer is learnt.

    Args:
        tokenizer: whose template it is.
        arguments: further arguments of the template (`{"enable_thinking": false}`).
        thinking: where an answer stands: "empty" = after an empty, closed thinking block, "none" =
            right after the generation prompt, "own" = each answer brings its own block; "auto" =
            "empty" where the template has a block before an answer, else "none".

    Raises:
        ArgumentError: there is no template, it cannot be rendered, or an answer cannot stand there.
        UnsafeFileError: it takes more time or memory than any template needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        arguments: Mapping[str, Any] | None = None,
        thinking: str = "auto",
    ) -> None:
        self._tokenizer = tokenizer
        self.name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise ArgumentError(
                f"The tokenizer {self.name!r} has no chat template: leave out --chat_template, or "
                "use the chat model's own tokenizer."
            )
        self.arguments = dict(arguments or {})
        if taken := [name for name in self.arguments if name in _RESERVED]:
            raise ArgumentError(
                f"--chat_template_kwargs cannot set {', '.join(taken)}: the rows say it."
            )
        if thinking not in THINKING:
            raise ArgumentError(f"--thinking {thinking}: give one of {', '.join(THINKING)}.")
        self._check_arguments()
        self.thinking = self._settled(thinking)

    def render(self, turns: Turns, *, prompt: bool = True) -> str:
        """A conversation as the model sees it.

        Args:
            turns: the messages.
            prompt: up to where the answer begins, and not as it stands.
        """
        rendered = self._render(turns, add_generation_prompt=prompt)
        return f"{rendered}{self.bridge}" if prompt else rendered

    @property
    def bridge(self) -> str:
        """What stands between the generation prompt and an answer."""
        return self._empty_block if self.thinking == "empty" else ""

    @property
    def source(self) -> str:
        """All that a prompt may have from the template."""
        return f"{self._source}{self.bridge}"

    def answer(self, example: Example) -> str:
        """The example's answer as it stands behind the prompt.

        Raises:
            MalformedRowError: its own thinking block cannot stand there, or is missing.
        """
        text = (example.target or "").strip()
        block = own_block(text)
        if self.thinking == "own":
            if block is None or block[1] not in text:
                raise MalformedRowError(
                    f"Row {example.row}: the answer does not begin with a thinking block (such as "
                    "<think>…</think>), as --thinking own promises; leave it out for answers "
                    "without reasoning."
                )
            opened = open_block(self._generation_prompt) is not None
            return text.removeprefix(block[0]).lstrip() if opened else text
        if block is not None and ends_with_block(self._generation_prompt + self.bridge):
            raise MalformedRowError(
                f"Row {example.row}: the answer begins with {block[0]}, and the chat template "
                "writes such a block before it: learn the rows' reasoning with --thinking own, or "
                "take it out of the answers."
            )
        return text

    def marks_of(self, answer: str) -> list[str]:
        """The marks of the thinking block that an answer brings (`--thinking own`), in order."""
        if self.thinking != "own":
            return []
        block, closing = own_block(answer), open_block(self._generation_prompt)
        marks = [closing] if block is None else list(block)
        return [mark for mark in marks if mark and mark in answer]

    @property
    def announcement(self) -> str | None:
        """Where the answers stand, where that is not plain."""
        if self.bridge:
            return f"after {self.bridge.strip()!r}, without reasoning (--thinking empty)"
        if self.thinking == "own":
            return "with the rows' own reasoning before them (--thinking own)"
        return None

    def end_of_answer(self) -> str:
        """What the template writes behind an answer."""
        return self._answered.rpartition(MARKER)[2]

    # ---- the block before an answer -------------------------------------------------------------

    def _settled(self, thinking: str) -> str:
        if thinking == "auto":
            return "empty" if self._empty_block else "none"
        if thinking == "none" and (closing := open_block(self._generation_prompt)):
            raise ArgumentError(
                f"--thinking none: the chat template of {self.name!r} leaves a thinking block open "
                f"({closing} is missing), so the answers would be learnt as reasoning. Take "
                "--thinking empty, or own for rows that bring their reasoning."
            )
        closed = ends_with_block(self._generation_prompt)
        if thinking == "empty" and not self._empty_block and not closed:
            raise ArgumentError(
                f"--thinking empty: the chat template of {self.name!r} has no thinking block "
                "before an answer: leave it out."
            )
        return thinking

    @cached_property
    def _generation_prompt(self) -> str:
        return self._render([{"role": "user", "content": "a"}], add_generation_prompt=True)

    @cached_property
    def _answered(self) -> str:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER}]
        return self._render(turns, add_generation_prompt=False)

    @cached_property
    def _empty_block(self) -> str:
        return empty_block(self._generation_prompt, self._answered.partition(MARKER)[0])

    # ---- rendering ------------------------------------------------------------------------------

    @property
    def _is_code(self) -> bool:
        """Whether the tokenizer's own class lays conversations out, and no template."""
        own = type(self._tokenizer).apply_chat_template
        return own is not PreTrainedTokenizerBase.apply_chat_template

    @cached_property
    def _source(self) -> str:
        template = self._tokenizer.chat_template
        return str(template if self._is_code else self._tokenizer.get_chat_template())

    def _check_arguments(self) -> None:
        if not self.arguments or self._is_code:
            return
        try:
            known = variables(self._source)
        except TemplateError:  # said when it is rendered
            return
        if unknown := [name for name in self.arguments if name not in known]:
            raise ArgumentError(
                f"--chat_template_kwargs: the chat template of {self.name!r} does not read "
                f"{', '.join(unknown)}: check the spelling, or leave it out."
            )

    def _render(self, turns: Turns, *, add_generation_prompt: bool) -> str:
        tokenizer = self._tokenizer
        try:
            if self._is_code:
                return str(
                    tokenizer.apply_chat_template(
                        [dict(turn) for turn in turns],
                        add_generation_prompt=add_generation_prompt,
                        tokenize=False,
                        **self.arguments,
                    )
                )
            given = {
                **tokenizer.special_tokens_map,
                **self.arguments,
                "messages": [dict(turn) for turn in turns],
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
            return render(self._source, given)
        except UnsafeFileError as error:
            raise UnsafeFileError(
                f"The chat template of the tokenizer {self.name!r} is not rendered: it {error}, "
                "which no chat template needs."
            ) from error
        except Exception as error:  # a template is a program, and may raise anything
            reason = str(error)
            raise ArgumentError(
                f"The chat template of the tokenizer {self.name!r} cannot be rendered: "
                f"{type(error).__name__}: {reason[:_LONGEST_REASON]}"
                f"{'…' if len(reason) > _LONGEST_REASON else ''}"
            ) from error
