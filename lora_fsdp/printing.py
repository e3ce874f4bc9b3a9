"""The one way of texts to a terminal or a page: nothing invisible in them does anything there.

A label, a file's name or a model's answer may hold an escape sequence, or a character that turns
the direction of what follows it. Neither reaches a reader: each is shown as its escape.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import TextIO

# Parts of ordinary writing that `str.isprintable` counts as invisible: joiners in emoji and in
# Persian or Indic words, and the marks of writing direction that do not reorder other text.
_HARMLESS = {"\u200c", "\u200d", "\u200e", "\u200f"}
_LINES = {"\n", "\t"}


def visible(text: str, *, lines: bool = True) -> str:
    """`text` with control characters and those that turn the direction of text as escapes.

    Args:
        text: any text.
        lines: leave line breaks and tabs as they are; otherwise they are escapes too.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if _may_be_shown(letter, lines=lines) else letter.encode("unicode_escape").decode()
        for letter in text
    )


def visible_json(document: str) -> str:
    """A JSON document that says the same and can be shown."""
    if document.isprintable():
        return document
    return "".join(
        letter if _may_be_shown(letter, lines=True) else json.dumps(letter)[1:-1]
        for letter in document
    )


def say(text: str, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a line or several, on stdout unless `file` is another stream."""
    stream = sys.stdout if file is None else file
    print(visible(text), file=stream, flush=flush)


def _may_be_shown(letter: str, *, lines: bool) -> bool:
    if letter.isprintable() or letter in _HARMLESS or (lines and letter in _LINES):
        return True
    # Blanks of other widths, such as the one between Chinese characters.
    return unicodedata.category(letter) == "Zs"
