"""Texts of the data as they can be shown: shortened, nothing invisible in them, no markup."""

from __future__ import annotations

import html
import re

from lora_fsdp.printing import visible

# What means something to Markdown within a line, and what makes an address a link by itself.
_MARKUP = re.compile(r"([\\`*_{}\[\]#!|~$^:@]|(?<=www)\.)", flags=re.IGNORECASE)


def setting_text(value: object) -> str:
    """The value of a setting; whole numbers without a decimal point."""
    return f"{value:g}" if isinstance(value, float) else one_line(str(value))


def one_line(text: str, *, limit: int = 240) -> str:
    """`text` on one line of at most `limit` characters, the cut marked by an ellipsis.

    Control characters and those that turn the direction of what follows are shown as escapes.
    """
    # A text of megabytes is not walked through for the sake of its first line.
    line = " ".join(text[: 4 * limit].split())
    cut = len(line) > limit or len(text) > 4 * limit
    if cut:
        line = line[: limit - 1].rstrip() + "…"
    return visible(line, lines=False)


def inline(value: object, *, limit: int = 120) -> str:
    """`value` for the middle of a line, with all escaped that Markdown, HTML or a table would read.

    Source: https://spec.commonmark.org/0.31.2/#backslash-escapes
    """
    line = _MARKUP.sub(r"\\\1", one_line(str(value), limit=limit))
    return html.escape(line, quote=False)


def fenced(text: str, language: str) -> str:
    """`text` as a block of code; no line of it can end the block."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    # A carriage return alone ends a line too.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    shown = map(visible, lines)
    return "\n".join([f"{fence}{language}", *shown, fence])
