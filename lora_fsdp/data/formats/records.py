"""The records of a text file, one by one: for whole tables and for streams."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_fsdp.data.formats.separators import without_sep_line
from lora_fsdp.errors import (
    DataFileNotFoundError,
    MalformedRowError,
    NoRowsError,
    TableEncodingError,
)
from lora_fsdp.tasks.cells import parse_json

HALF_SURROGATE = re.compile("[\ud800-\udfff]")


def delimited_records(lines: Iterable[str], *, source: Path, separator: str) -> Iterator[list[str]]:
    """The cells of the header and of each row of a CSV or TSV file; empty lines are left out.

    pandas' parser fills short rows up and takes a long first row for an index; this one says where
    a row is wrong. Excel's first line `sep=;` is no row.

    Raises:
        MalformedRowError: a row is not well-formed, or has not as many fields as the header.
        NoRowsError: there is no header.
    """
    lines, left_out = without_sep_line(lines)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    # A text may be longer than csv's own limit of 128 KiB a cell.
    former_limit = csv.field_size_limit(2**31 - 1)
    fields, line = 0, 1 + left_out
    try:
        for row in reader:
            if row and fields and len(row) != fields:
                raise MalformedRowError(
                    f"{source}, line {line}: {len(row)} fields where the header has {fields}. Put "
                    "a field that contains a separator, a quote or a line break in double quotes, "
                    "or name another separator with --delimiter."
                )
            if row:
                fields = len(row)
                yield row
            line = reader.line_num + 1 + left_out
    except csv.Error as error:
        raise MalformedRowError(
            f"{source}, line {line}: {error}. A double quote inside a quoted field is written "
            "twice, and every quote that opens must close."
        ) from error
    finally:
        csv.field_size_limit(former_limit)
    if not fields:
        raise NoRowsError(f"{source} is empty.")


def text_lines(lines: Iterable[str]) -> Iterator[str]:
    """The texts of a file with one text a line, without those that are empty."""
    for line in lines:
        if text := line.rstrip("\r\n"):
            yield text


def json_records(lines: Iterable[str], *, source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of JSON Lines, each with the line it stands on; empty lines are left out.

    Raises:
        MalformedRowError: a line is no JSON object.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            value = load_json(line.removesuffix("\n"), source=source, first_line=number)
            yield line.strip(), checked_record(value, f"{source}, line {number}")


def load_json(text: str, *, source: Path, first_line: int) -> Any:
    """The JSON value of `text`, which begins on line `first_line` of `source`."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise MalformedRowError(
            f"{source}, line {line}, column {error.colno}: {error.msg}. Give one JSON object a "
            "line, or (to train and to evaluate) one list of objects."
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
        raise MalformedRowError(
            f"{source}, line {first_line}: {error}. A row must be a plain JSON object."
        ) from error


def checked_record(value: object, where: str) -> dict[str, Any]:
    """`value` itself, if it is a JSON object that can be written again."""
    if not isinstance(value, dict):
        raise MalformedRowError(f"{where}: a row must be a JSON object.")
    text = json.dumps(value, ensure_ascii=False)
    if half := HALF_SURROGATE.search(text):
        near = text[max(0, half.start() - 20) : half.end() + 20]
        raise MalformedRowError(f"{where}: half a surrogate pair (\\ud8…) in {near!r}.")
    return value


def not_found(source: Path) -> DataFileNotFoundError:
    """The error for a missing file, with the nearest name in its folder."""
    folder = source.resolve().parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    nearest = difflib.get_close_matches(source.name, names, n=1)
    hint = f" Did you mean {str(folder / nearest[0])!r}?" if nearest else ""
    return DataFileNotFoundError(f"There is no data file {str(source.resolve())!r}.{hint}")


def wrong_encoding(
    source: Path, encoding: str, error: UnicodeDecodeError, *, whole: bool = False
) -> TableEncodingError:
    """The error for bytes that are not in `encoding`; of a `whole` file it gives the offset."""
    place = f" at offset {error.start}" if whole else ""
    return TableEncodingError(
        f"{source} is not {encoding.removesuffix('-sig')}: byte "
        f"0x{error.object[error.start]:02x}{place} ({error.reason}). Name its encoding, for "
        "example --encoding latin-1."
    )
