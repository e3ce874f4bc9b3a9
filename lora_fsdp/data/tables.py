"""Data files as tables, exactly as written: no type is guessed or changed, in no cell."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import charset_normalizer
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lora_fsdp.data.formats.compressed import TableFile, table_file
from lora_fsdp.data.formats.labelling import plain_rows, refuse_token_labels
from lora_fsdp.data.formats.nested import with_nested_columns
from lora_fsdp.data.formats.records import (
    HALF_SURROGATE,
    checked_record,
    delimited_records,
    json_records,
    load_json,
    text_lines,
    wrong_encoding,
)
from lora_fsdp.data.formats.separators import (
    SEPARATORS,
    TEXT_LINES,
    checked_delimiter,
    find_separator,
)
from lora_fsdp.data.formats.several import hub_name, load_from_hub, table_paths
from lora_fsdp.data.formats.spreadsheets import (
    SPREADSHEETS,
    refuse_other_spreadsheet,
    sheet_rows,
)
from lora_fsdp.data.formats.typed_cells import typed_columns
from lora_fsdp.errors import (
    ArgumentError,
    MalformedRowError,
    NoRowsError,
    TableEncodingError,
    UnsupportedTableError,
)

logger = logging.getLogger(__name__)

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*SEPARATORS, *_JSON_SUFFIXES, ".parquet", *SPREADSHEETS)
_SUPPORTED = f"{', '.join([*_SUFFIXES, TEXT_LINES])} (also .gz, .zip), a folder of save_to_disk"

# What text files are in when they are not Unicode. Left to choose among all 99 encodings it knows,
# charset-normalizer takes the few accents of a mostly ASCII file for Baltic DOS.
_LEGACY_ENCODINGS = ["cp1252", "cp1251", "gb18030", "big5", "cp932", "cp949"]


def read_table(
    path: str | Path,
    *,
    encoding: str | None = None,
    delimiter: str | None = None,
    sheet: str | None = None,
    nested: bool = False,
) -> pd.DataFrame:
    """Reads a table from CSV, TSV, JSON (lines or a list), Parquet, .xlsx or a `datasets` folder.

    Cells of CSV and TSV are text to the letter ("NA", "null", "007"); an empty cell is "". Those of
    other formats keep their own type, whatever stands beside them: a whole number is an `int` also
    in a column with missing values, and a decimal of JSON is written again as it was. What a
    labelling tool exported becomes a table of texts and labels (`plain_rows`). Of a saved
    `DatasetDict`, and of a folder whose files are called so, the split "train" is taken; name
    another split's own file.

    Args:
        path: a file, also packed (.gz, .bz2, .xz, .zip of one table); a pattern (`data/*.csv`),
            several paths with `os.pathsep` between them, or a folder, whose files must have the
            same columns; or the name of a dataset on the Hub.
        encoding: of a text file, by Python's name for it; `None` = UTF-8, or, where the file is
            not, what charset-normalizer makes of it, which is logged.
        delimiter: between the cells of CSV or TSV; `None` = what `find_separator` finds.
        sheet: of a workbook with several.
        nested: the entries of cells that are objects are columns as well (`review.body`).

    Returns:
        The rows, with the index "row" counting from 1 (data rows, not lines of the file).

    Raises:
        DataFileNotFoundError, UnsupportedTableError, TableEncodingError, MalformedRowError,
        NoRowsError: the file is missing, of another format, not in the encoding, not well-formed
            at a line, or holds no rows.
        ArgumentError: `delimiter` is no single character, or the file has no separators; `sheet`
            is none of the workbook's, or is needed.
        DownloadError: a dataset could not be had from the Hub.
    """
    if match := hub_name(path, _SUFFIXES):
        table = _dataset_rows(load_from_hub(match), match[1])
    else:
        files = table_paths(path, _SUFFIXES)
        read = [
            _read_one(file, encoding=encoding, delimiter=delimiter, sheet=sheet) for file in files
        ]
        table = joined(read, files)
    if len(table) == 0:
        raise NoRowsError(f"{path} holds no rows.")
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return with_nested_columns(table) if nested else table


def joined(tables: Sequence[pd.DataFrame], files: Sequence[str | Path]) -> pd.DataFrame:
    """Several tables of the same columns as one.

    Raises:
        MalformedRowError: one has other columns; the message names its file.
    """
    if len(tables) == 1:
        return tables[0]
    for file, table in zip(files, tables, strict=True):
        if set(table.columns) != set(tables[0].columns):
            raise MalformedRowError(
                f"{file} has the columns {', '.join(map(repr, table.columns))}, and {files[0]} "
                f"{', '.join(map(repr, tables[0].columns))}: files that are read as one table need "
                "the same."
            )
    logger.info("%d files are read as one table, from %s to %s.", len(files), files[0], files[-1])
    return pd.concat([table[list(tables[0].columns)] for table in tables], ignore_index=True)


def _read_one(
    source: Path, *, encoding: str | None, delimiter: str | None, sheet: str | None
) -> pd.DataFrame:
    file = TableFile(source, "") if source.is_dir() else table_file(source)
    suffix = file.suffix
    checked_delimiter(delimiter, source, suffix=suffix)
    if sheet is not None and suffix not in SPREADSHEETS:
        raise ArgumentError(f"--sheet {sheet!r} is for workbooks (.xlsx), and {source} is none.")
    if source.is_dir():
        return _read_saved_dataset(source)
    if suffix in (*SEPARATORS, TEXT_LINES):
        return _parse_delimited(_read_text(file, encoding), file=file, delimiter=delimiter)
    if suffix in _JSON_SUFFIXES:
        return _parse_json(_read_text(file, encoding), source)
    if suffix == ".parquet":
        return _read_parquet(file)
    if suffix in SPREADSHEETS and not file.packing:
        names, rows = sheet_rows(source, sheet=sheet)
        return pd.DataFrame(rows, columns=names, dtype=object)
    refuse_token_labels(source, suffix)
    refuse_other_spreadsheet(source, suffix)
    raise UnsupportedTableError(f"{source} is no table that can be read: use {_SUPPORTED}.")


def dataset_table(rows: Any, *, name: str) -> pd.DataFrame:
    """The table of a `datasets.Dataset` or of a list of rows, its cells as `read_table` has them.

    Args:
        rows: a dataset in memory, or dicts.
        name: of the argument that it was given as, for messages.

    Raises:
        NoRowsError: it has none.
        MalformedRowError: a cell cannot be a Python value, or a row is no dict.
    """
    if not isinstance(rows, Sequence):
        table = _dataset_rows(rows, name)
    else:
        strange = next(
            (place for place, row in enumerate(rows) if not isinstance(row, Mapping)), None
        )
        if strange is not None:
            kind = type(rows[strange]).__name__
            raise MalformedRowError(f"{name}, row {strange + 1} is a {kind} and not a dict.")
        table = _as_written(rows)
    if len(table) == 0:
        raise NoRowsError(f"{name} holds no rows.")
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table


def sample_rows(
    table: pd.DataFrame, *, max_rows: int | None, head: int | None, seed: int
) -> pd.DataFrame:
    """At most `max_rows` random rows in their original order, or the first `head` rows.

    For one seed, a smaller sample is part of a larger one.

    Raises:
        ArgumentError: both are given, or a number below 1.
    """
    if max_rows is not None and head is not None:
        raise ArgumentError(f"max_rows={max_rows} and head={head} exclude each other: give one.")
    for name, count in (("max_rows", max_rows), ("head", head)):
        if count is not None and count < 1:
            raise ArgumentError(f"{name}={count}: give a number of rows from 1, or leave it out.")
    if max_rows is None:
        return table.head(len(table) if head is None else head)
    chosen = np.random.default_rng(seed).permutation(len(table))[:max_rows]
    return table.iloc[np.sort(chosen)]


def _read_text(file: TableFile, encoding: str | None) -> str:
    source, raw = file.path, file.read()
    try:
        text = raw.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise wrong_encoding(source, encoding, error, whole=True) from error
        text = _decode_legacy(raw, source=source, failure=error)
    except UnicodeError as error:  # of codecs that are no encodings of files
        raise TableEncodingError(f"{source} is not {encoding}: {error}.") from error
    except (LookupError, ValueError) as error:
        raise TableEncodingError(f"{source}: there is no encoding {encoding!r}.") from error
    # Some encodings let them through, and they could never be written again.
    if half := HALF_SURROGATE.search(text):
        raise MalformedRowError(
            f"{source}, line {_line_of(half.start(), text)}: half a surrogate pair. Name the "
            "file's real encoding with --encoding."
        )
    if "\0" in text:
        raise MalformedRowError(
            f"{source}, line {_line_of(text.index(chr(0)), text)}: NUL byte. The file is damaged, "
            "or it is UTF-16 without a mark (then pass --encoding utf-16-le)."
        )
    return text.removeprefix("\ufeff")


def _line_of(place: int, text: str) -> int:
    return text.count("\n", 0, place) + 1


def _decode_legacy(raw: bytes, *, source: Path, failure: UnicodeDecodeError) -> str:
    unicode_marks = ["utf_16", "utf_32"]
    matches = charset_normalizer.from_bytes(raw, cp_isolation=_LEGACY_ENCODINGS + unicode_marks)
    best = matches.best()
    if best is None:
        raise wrong_encoding(source, "utf-8", failure, whole=True) from failure
    text = raw.decode(best.encoding)
    first = next((place for place, letter in enumerate(text) if not letter.isascii()), 0)
    logger.warning(
        "%s is not UTF-8 (byte offset %d). Reading it as %s, a guess: %r. "
        "If that looks wrong, name the encoding with --encoding.",
        source, failure.start, best.encoding, text[max(0, first - 20) : first + 20],
    )  # fmt: skip
    return text


def _parse_delimited(text: str, *, file: TableFile, delimiter: str | None) -> pd.DataFrame:
    source, lines = file.path, io.StringIO(text, newline="")
    separator = find_separator(lines, source=source, suffix=file.suffix, delimiter=delimiter)
    lines.seek(0)
    if not separator:
        texts = list(text_lines(lines))
        logger.info("%s is read as one text a line (%d); a table needs --delimiter.",
                    source, len(texts))  # fmt: skip
        return pd.DataFrame({"text": texts}, dtype="str")
    header, *rows = delimited_records(lines, source=source, separator=separator)
    names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(header)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MalformedRowError(
            f"{source}, line 1: the header names {', '.join(map(repr, twice))} more than once."
        )
    return pd.DataFrame(rows, columns=names, dtype="str")


def _parse_json(text: str, source: Path) -> pd.DataFrame:
    """Records of JSON Lines, or of one list of records."""
    if text.lstrip().startswith("["):
        values = enumerate(load_json(text, source=source, first_line=1), start=1)
        rows = [checked_record(v, f"{source}, record {n}") for n, v in values]
    else:  # not splitlines: U+2028 and its like may stand inside JSON strings
        rows = [record for _, record in json_records(text.split("\n"), source=source)]
    return _as_written(plain_rows(rows, source))


def _as_written(rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Rows, or columns by name, as a table; as plain objects, so that pandas changes no cell."""
    return pd.DataFrame(rows, dtype=object)


def _read_parquet(file: TableFile) -> pd.DataFrame:
    source: Path = file.path
    try:
        with pq.ParquetFile(io.BytesIO(file.read()) if file.packing else source) as parquet:
            table = parquet.read()
    except (OSError, ValueError, pa.ArrowException) as error:  # ArrowInvalid is a ValueError
        raise UnsupportedTableError(f"{source} is not a Parquet file: {error}") from error
    return _typed_table(table, source)


def _typed_table(table: pa.Table, source: Path | str) -> pd.DataFrame:
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MalformedRowError(f"{source} has {', '.join(map(repr, twice))} more than once.")
    try:
        columns = typed_columns(table)
    except (OverflowError, ValueError) as error:  # a date after the year 9999, text not UTF-8
        raise MalformedRowError(f"{source} holds a cell that Python cannot: {error}.") from error
    if any(name.endswith(".responses.status") for name in columns):  # Argilla's
        rows = zip(*columns.values(), strict=True)
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        return _as_written(plain_rows(records, Path(source)))
    return _as_written(columns)


def _read_saved_dataset(folder: Path) -> pd.DataFrame:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged, it raises whatever its JSON or Arrow parts do
        raise UnsupportedTableError(
            f"The folder {folder} was not written by datasets' save_to_disk, or is damaged: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}. "
            f"What can be read: {_SUPPORTED}."
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        splits = sorted(saved)
        if "train" not in saved:
            raise UnsupportedTableError(
                f"{folder} holds the splits {', '.join(splits)} and no train: name one of their "
                f"folders, such as {folder / splits[0]}."
            )
        logger.info("%s holds the splits %s: reading train.", folder, ", ".join(splits))
        saved = saved["train"]
    return _dataset_rows(saved, folder)


def _dataset_rows(dataset: Any, source: Path | str) -> pd.DataFrame:
    """The rows of a `datasets.Dataset`, with the names of its classes."""
    schema = dataset.features.arrow_schema
    table = dataset.with_format("arrow")[:]
    return _typed_table(table.replace_schema_metadata(schema.metadata), source)
