"""What separates the cells of a CSV or TSV file: named, written into the file, or found."""

from __future__ import annotations

import csv
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_fsdp.errors import ArgumentError, MalformedRowError

logger = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".psv": "|"}
#: One text a line; a table only where a separator is named or written into it.
TEXT_LINES = ".txt"
_OTHERS = (";", "\t", "|", ",")
_ROWS_LOOKED_AT = 100
# Excel's first line, for its own use.
_SEP_LINE = re.compile(r'"?sep=([^\r\n"])"?[\r\n]*', flags=re.IGNORECASE)


def checked_delimiter(delimiter: str | None, source: Path, *, suffix: str) -> str | None:
    """`--delimiter` as one character; `tab` and `\\t` are the tabulator.

    Raises:
        ArgumentError: it is no single character, or the file has no separators.
    """
    if delimiter is None:
        return None
    if source.is_dir() or suffix not in (*SEPARATORS, TEXT_LINES):
        raise ArgumentError(
            f"--delimiter {delimiter!r} is for {', '.join(SEPARATORS)} and {TEXT_LINES}, and "
            f"{source} is none of them: leave it out."
        )
    separator = "\t" if delimiter in ("tab", "\\t") else delimiter
    if len(separator) != 1 or separator in '"\r\n\0':
        raise ArgumentError(
            f"--delimiter {delimiter!r}: give the one character between cells, such as ';', or tab."
        )
    return separator


def find_separator(
    lines: Iterable[str], *, source: Path, suffix: str, delimiter: str | None
) -> str:
    """The separator of a file: `delimiter`, Excel's `sep=` line, the suffix's, or another.

    A file of texts (.txt) has none, which is "", unless it is named or written into the file.

    Another one is looked for where the suffix's does not occur in the header: it must divide the
    first hundred rows into as many fields as the header.

    Raises:
        ArgumentError: `delimiter` is none.
        MalformedRowError: more than one character would fit.
    """
    if given := checked_delimiter(delimiter, source, suffix=suffix):
        return given
    lines = iter(lines)
    first = next(lines, "")
    if line := _SEP_LINE.fullmatch(first):
        return line[1]
    if suffix == TEXT_LINES:
        return ""
    usual = SEPARATORS[suffix]
    sample = [first, *itertools.islice(lines, 10 * _ROWS_LOOKED_AT)]
    if _fields(sample, usual, rows=1) != 1:
        return usual
    fitting = [one for one in _OTHERS if one != usual and _fields(sample, one) > 1]
    if len(fitting) > 1:
        raise MalformedRowError(
            f"{source} may be separated by {' or '.join(map(repr, fitting))}: name the separator "
            "with --delimiter."
        )
    if not fitting:
        return usual
    logger.info("%s is separated by %r.", source, fitting[0])
    return fitting[0]


def without_sep_line(lines: Iterable[str]) -> tuple[Iterator[str], int]:
    """The lines without Excel's `sep=`, and how many were left out."""
    lines = iter(lines)
    first = next(lines, "")
    if _SEP_LINE.fullmatch(first):
        return lines, 1
    return itertools.chain([first] if first else [], lines), 0


def _fields(sample: list[str], separator: str, *, rows: int = _ROWS_LOOKED_AT) -> int:
    """Fields of the header, if the rows after it have as many; 0 if not."""
    former_limit = csv.field_size_limit(2**31 - 1)
    reader = (row for row in csv.reader(sample, delimiter=separator) if row)
    try:
        counts = {len(row) for row in itertools.islice(reader, rows)}
    except csv.Error:  # said with its line when the file is read
        return 0
    finally:
        csv.field_size_limit(former_limit)
    return counts.pop() if len(counts) == 1 else 0
