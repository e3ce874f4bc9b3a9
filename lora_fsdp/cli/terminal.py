"""What goes to the terminal: plain text, marked where a terminal can show it, never too wide."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_fsdp.printing import visible


def write(text: str, *, marked: str = "") -> None:
    """`text` and then `marked`, which stands out where the terminal has colours.

    Nothing is cut or wrapped by us. Colours follow rich's rules (NO_COLOR, TERM=dumb, a pipe).
    """
    line = Text(visible(text))
    line.append(visible(marked), style="bold green")
    Console(soft_wrap=True, highlight=False).print(line)


def table_text(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text, in the width of the terminal; the first column is text.

    Where it is too wide, the second column's cells take several lines: words stay whole.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        name, side = Text(visible(heading, lines=False)), "right" if place else "left"
        table.add_column(name, justify=side, no_wrap=place != 1)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    console = Console(color_system=None, width=width())
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def width() -> int:
    """Characters a line, at most 100."""
    return min(Console().width, 100)


def is_live() -> bool:
    """Whether stderr is a terminal on which a progress bar can be redrawn."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
