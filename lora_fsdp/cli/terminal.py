"""What goes to the terminal: plain text, marked where a terminal can show it, never too wide."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_fsdp.printing import visible

# Characters: a line that holds any row, to ask how many a table needs at least.
_UNBOUNDED = 10_000


def write(text: str, *, marked: str = "") -> None:
    """`text` and then `marked`, which stands out where the terminal has colours.

    Nothing is cut or wrapped by us. Colours follow rich's rules (NO_COLOR, TERM=dumb, a pipe).
    """
    line = Text(visible(text))
    line.append(visible(marked), style="bold green")
    Console(soft_wrap=True, highlight=False).print(line)


def write_words(text: str) -> None:
    """A sentence or two; on a terminal no word of it is broken at the end of a line."""
    if Console().is_terminal:
        text = "\n".join(
            textwrap.fill(line, width(), break_long_words=False, break_on_hyphens=False)
            for line in text.split("\n")
        )
    write(text)


def table_text(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text, in the width of the terminal; the first column is text.

    Where it is too wide, columns stand closer and the second column's cells take several lines.
    Words stay whole: where even that is too wide, each row becomes a few lines.
    """
    for between in (3, 2, 1):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, between - 1, 0, 0))
        for place, heading in enumerate(headings):
            cells = [visible(row[place]) for row in (headings, *rows)]
            whole = [word for cell in cells for word in cell.split()] if place == 1 else cells
            table.add_column(
                Text(visible(heading, lines=False)),
                justify="right" if place else "left",
                no_wrap=place != 1,
                min_width=max(map(cell_len, whole), default=1),
            )
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        if Console(width=_UNBOUNDED).measure(table).minimum <= width():
            console = Console(color_system=None, width=width())
            with console.capture() as captured:
                console.print(table)
            return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")
    return "\n".join(_as_lines(headings, row) for row in rows)


def _as_lines(headings: Sequence[str], row: Sequence[str]) -> str:
    """A row that no line holds: its first cell, and below it the others with their headings."""
    first, *others = (visible(cell, lines=False) for cell in row)
    named = [f"{name} {cell}" for name, cell in zip(headings[1:], others, strict=True) if cell]
    below = textwrap.fill(
        ", ".join(named),
        width=width(),
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"{textwrap.fill(first, width())}\n{below}"


def width() -> int:
    """Characters a line, at most 100."""
    return min(Console().width, 100)


def is_live() -> bool:
    """Whether stderr is a terminal on which a progress bar can be redrawn."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
