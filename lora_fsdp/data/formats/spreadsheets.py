"""Excel's workbooks (.xlsx): one sheet as a table, each cell as it is stored."""

from __future__ import annotations

import datetime as dt
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_fsdp.data.formats.compressed import check_unpacked
from lora_fsdp.errors import (
    ArgumentError,
    MalformedRowError,
    MissingPackageError,
    NoRowsError,
    UnsupportedTableError,
    did_you_mean,
)

SPREADSHEETS = (".xlsx", ".xlsm")
# What zipfile, XML and openpyxl itself raise where a workbook is none.
_DAMAGED = (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, SyntaxError,
            zipfile.BadZipFile)  # fmt: skip
_OTHERS = {".xls", ".xlsb", ".ods", ".numbers"}


def refuse_other_spreadsheet(source: Path, suffix: str) -> None:
    """Say what to do with a spreadsheet of another kind.

    Raises:
        UnsupportedTableError: it is one.
    """
    if suffix in _OTHERS:
        raise UnsupportedTableError(
            f"{source} is a spreadsheet of a kind that is not read: save it as .xlsx or as CSV."
        )


def sheet_rows(source: Path, *, sheet: str | None = None) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns and the rows of a workbook's only sheet, or of the one that is named.

    The first row that is not empty has the columns' names; empty rows and columns are left out.
    Whole numbers are `int`, an empty cell is `None`, a date without a time is a `date`, and an
    integer that is shown with leading zeros (format 000) is the text that it is shown as.

    Raises:
        MissingPackageError: openpyxl is not installed.
        UnsupportedTableError: it is no workbook.
        ArgumentError: it has several sheets and none is named, or not the named one.
        NoRowsError: the sheet is empty.
        MalformedRowError: a column occurs twice, or a formula's value is not stored.
    """
    book = _opened(source)
    try:
        chosen = _chosen(book, source, sheet)
        cells = _cells(chosen, source)
        rows = [(n, row) for n, row in enumerate(cells, 1) if any_value(row)]
    finally:
        book.close()
    if not rows:
        raise NoRowsError(f"{source}, sheet {chosen.title!r}: it is empty.")
    (_, header), *body = rows
    names = _names(header, body, source)
    _refuse_unstored(source, chosen.title, body)
    return list(names.values()), [
        {name: row[place] if place < len(row) else None for place, name in names.items()}
        for _, row in body
    ]


def write_sheet(columns: Sequence[str], rows: Iterable[Sequence[Any]], path: Path) -> None:
    """Write a table as a workbook of one sheet.

    Raises:
        MalformedRowError: a text cannot be stored in a workbook.
    """
    openpyxl = _package()
    from openpyxl.utils.exceptions import IllegalCharacterError

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("answers")
    try:
        sheet.append([_text_cell(sheet, name) for name in columns])
        for row in rows:
            sheet.append([_text_cell(sheet, value) for value in row])
    except IllegalCharacterError as error:
        raise MalformedRowError(f"A workbook cannot hold the text {str(error)[:80]!r}.") from error
    book.save(path)


def _text_cell(sheet: Any, value: Any) -> Any:
    """A text that begins with "=" as the text that it is, and no formula."""
    if not isinstance(value, str) or not value.startswith("="):
        return value
    from openpyxl.cell import WriteOnlyCell

    cell = WriteOnlyCell(sheet, value=value)
    cell.data_type = "s"
    return cell


def any_value(row: Iterable[Any]) -> bool:
    """Whether a row has a cell that is not empty."""
    return any(value is not None and value != "" for value in row)


def _package() -> Any:
    try:
        import openpyxl
    except ImportError as error:
        raise MissingPackageError(
            "Spreadsheets need openpyxl: pip install 'lora-fsdp[excel]', or save the sheet as CSV."
        ) from error
    return openpyxl


def _opened(source: Path, *, values: bool = True) -> Any:
    openpyxl = _package()
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with zipfile.ZipFile(source) as parts:
            check_unpacked(source, sum(part.file_size for part in parts.infolist()))
        return openpyxl.load_workbook(source, read_only=True, data_only=values)
    except (*_DAMAGED, InvalidFileException) as error:
        raise UnsupportedTableError(f"{source} is no .xlsx workbook: {error}.") from error


def _chosen(book: Any, source: Path, sheet: str | None) -> Any:
    by_name = {one.title: one for one in book.worksheets}
    if sheet is not None:
        if sheet not in by_name:
            raise ArgumentError(
                f"{source} has no sheet {sheet!r}.{did_you_mean(sheet, by_name)} There are "
                f"{', '.join(map(repr, by_name))}."
            )
        return by_name[sheet]
    filled = [one for one in by_name.values() if any(map(any_value, _cells(one, source)))]
    if len(filled) > 1:
        names = ", ".join(repr(one.title) for one in filled)
        raise ArgumentError(f"{source} has the sheets {names}: name one with --sheet.")
    return (filled or list(by_name.values()))[0]


def _cells(sheet: Any, source: Path) -> Iterator[tuple[Any, ...]]:
    # A sheet's stated size may be wrong (1,048,576 rows of nothing, or one cell).
    sheet.reset_dimensions()
    try:
        for row in sheet.iter_rows():
            yield tuple(_value(cell) for cell in row)
    except _DAMAGED as error:
        raise UnsupportedTableError(
            f"{source}, sheet {sheet.title!r}, is damaged: {type(error).__name__}: {error}."
        ) from error


def _value(cell: Any) -> Any:
    value = cell.value
    if isinstance(value, dt.datetime) and not re.search("[hHsS]", str(cell.number_format)):
        return value.date()
    if isinstance(value, int) and re.fullmatch("0{2,}", str(getattr(cell, "number_format", ""))):
        return str(value).zfill(len(cell.number_format))
    return value


def _names(
    header: Sequence[Any], body: Sequence[tuple[int, Sequence[Any]]], source: Path
) -> dict[int, str]:
    """The columns' names by their places; a column without a name and without a cell is none."""
    width = max([len(header), *(len(row) for _, row in body)])
    names: dict[int, str] = {}
    for place in range(width):
        name = (
            str(header[place]).strip() if place < len(header) and header[place] is not None else ""
        )
        if name or any(any_value(row[place : place + 1]) for _, row in body):
            names[place] = name or f"Unnamed: {place}"
    texts = list(names.values())
    if twice := sorted({name for name in texts if texts.count(name) > 1}):
        raise MalformedRowError(
            f"{source}: the first row names {', '.join(map(repr, twice))} more than once."
        )
    return names


def _refuse_unstored(source: Path, title: str, body: Sequence[tuple[int, Sequence[Any]]]) -> None:
    """Refuse a formula whose value the program that wrote the file never computed."""
    empty = {n for n, row in body if any(value is None for value in row)}
    if not empty:
        return
    book = _opened(source, values=False)
    try:
        sheet = book[title]
        sheet.reset_dimensions()
        values = dict(body)
        for number, row in enumerate(sheet.iter_rows(), 1):
            if number not in empty:
                continue
            for place, cell in enumerate(row):
                if cell.data_type == "f" and values[number][place] is None:
                    raise MalformedRowError(
                        f"{source}, sheet {title!r}, cell {cell.coordinate}: the formula's value "
                        "is not stored. Open the file in a spreadsheet program and save it."
                    )
    finally:
        book.close()
