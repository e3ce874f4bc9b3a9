"""Texts of the data as they can be shown: on one line, shortened, nothing invisible in them."""

from __future__ import annotations

# Parts of ordinary writing that `str.isprintable` counts as invisible: joiners in emoji and in
# Persian or Indic words, and the marks of writing direction that do not reorder other text.
_HARMLESS = {"\u200c", "\u200d", "\u200e", "\u200f"}


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
    return without_invisible(line)


def without_invisible(line: str) -> str:
    """`line` with control characters and those that turn the direction of text as escapes."""
    return "".join(
        letter
        if letter.isprintable() or letter in _HARMLESS
        else letter.encode("unicode_escape").decode()
        for letter in line
    )
