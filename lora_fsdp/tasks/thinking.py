"""Reasoning before an answer: the marks of a thinking block, in a template and in a row.

Some chat templates end the generation prompt inside a block (`<think>` of DeepSeek-R1), some put
an empty block or a channel before an answer (Qwen3, gpt-oss). An answer that is learnt right after
the generation prompt would stand inside the block, or where a server looks for a block.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

Thinking = Literal["auto", "empty", "none", "own"]
THINKING: tuple[str, ...] = get_args(Thinking)

_NAMES = r"(?:\w+:)?(?:think|thinking|thought|reason|reasoning|analysis|reflection)"
# What opens a block; each group's closing counterpart is made by `_closing`.
_OPENING = re.compile(
    rf"<(?P<tag>{_NAMES})>|\[(?P<bracket>{_NAMES})\]|\u25c1(?P<kimi>{_NAMES})\u25b7"
    rf"|<\|begin_of_(?P<named>{_NAMES}|solution)\|>|<\|START_(?P<command>THINKING)\|>",
    flags=re.IGNORECASE,
)
_SHAPES = {
    "tag": "</{}>",
    "bracket": "[/{}]",
    "kimi": "\u25c1/{}\u25b7",
    "named": "<|end_of_{}|>",
    "command": "<|END_{}|>",
}


def open_block(text: str) -> str | None:
    """What closes the thinking block that `text` leaves open, or `None`."""
    found = [(match, _closing(match)) for match in _OPENING.finditer(text)]
    if not found:
        return None
    last, closing = found[-1]
    return None if closing in text[last.end() :] else closing


def ends_with_block(text: str) -> bool:
    """Whether a thinking block, opened or closed, is the last thing in `text`."""
    found = list(_OPENING.finditer(text))
    if not found:
        return False
    rest = text[found[-1].end() :].strip()
    return not rest or rest.endswith(_closing(found[-1]))


def own_block(answer: str) -> tuple[str, str] | None:
    """The opening mark and what closes it, if an answer begins with its own thinking block."""
    match = _OPENING.match(answer.lstrip())
    return None if match is None else (match.group(), _closing(match))


def without_reasoning(text: str) -> str:
    """The answer after the reasoning, whether or not the block's opening stands in `text`."""
    for match in [*_OPENING.finditer(text)][:1]:
        if not text[: match.start()].strip():
            return text.partition(_closing(match))[2].strip() or text
    closed = re.search(rf"</{_NAMES}>|\[/{_NAMES}\]|\u25c1/{_NAMES}\u25b7", text, re.IGNORECASE)
    return text[closed.end() :].strip() if closed else text


def empty_block(generation_prompt: str, answered: str) -> str:
    """What stands between the generation prompt and an answer without reasoning.

    Args:
        generation_prompt: the conversation with the generation prompt.
        answered: the conversation up to the answer, as the template itself writes it.

    Returns:
        What the template itself puts there; where its generation prompt leaves a block open, what
        closes it; "" where the answer follows at once.
    """
    between = (
        answered.removeprefix(generation_prompt) if answered.startswith(generation_prompt) else ""
    )
    closing = open_block(generation_prompt)
    if between.strip() and (closing is None or closing in between):
        return between
    if closing is None:
        return ""
    # As the block was opened: on a line of its own, or not.
    return f"\n{closing}\n\n" if generation_prompt.endswith("\n") else closing


def _closing(match: re.Match[str]) -> str:
    kind = str(match.lastgroup)
    return _SHAPES[kind].format(match[kind])
