"""Texts of the data in Markdown: shown to the letter, never taken for markup."""

from __future__ import annotations

import html
import re

from lora_fsdp.reporting.texts import one_line, without_invisible

# What means something to Markdown within a line, and what makes an address a link by itself.
_MARKUP = re.compile(r"([\\`*_{}\[\]#!|~$^:@]|(?<=www)\.)", flags=re.IGNORECASE)


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
    shown = ["\t".join(map(without_invisible, line.split("\t"))) for line in lines]
    return "\n".join([f"{fence}{language}", *shown, fence])
