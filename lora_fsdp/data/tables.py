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

from lora_fsdp.data.records import (
    HALF_SURROGATE,
    checked_record,
    delimited_records,
    json_records,
    load_json,
    not_found,
    wrong_encoding,
)
from lora_fsdp.data.separators import SEPARATORS, checked_delimiter, find_separator
from lora_fsdp.data.typed_cells import typed_columns
from lora_fsdp.errors import (
    ArgumentError,
    MalformedRowError,
    NoRowsError,
    TableEncodingError,
    UnsupportedTableError,
)

logger = logging.getLogger(__name__)

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUPPORTED = ", ".join([*SEPARATORS, *_JSON_SUFFIXES, ".parquet", "a folder of save_to_disk"])

# What text files are in when they are not Unicode. Left to choose among all 99 encodings it knows,
# charset-normalizer takes the few accents of a mostly ASCII file for Baltic DOS.
_LEGACY_ENCODINGS = ["cp1252", "cp1251", "gb18030", "big5", "cp932", "cp949"]


def read_table(
    path: str | Path, *, encoding: str | None = None, delimiter: str | None = None
) -> pd.DataFrame:
    """Reads a table from CSV, TSV, JSON (lines or a list), Parquet or a `datasets` folder.

    Cells of CSV and TSV are text to the letter ("NA", "null", "007"); an empty cell is "". Those of
    other formats keep their own type, whatever stands beside them: a whole number is an `int` also
    in a column with missing values, and a decimal of JSON is written again as it was. Of a saved
    `DatasetDict` the split "train" is taken; name the split's own folder for another.

    Args:
        path: the file or folder.
        encoding: of a text file, by Python's name for it; `None` = UTF-8, or, where the file is
            not, what charset-normalizer makes of it, which is logged.
        delimiter: between the cells of CSV or TSV; `None` = what `find_separator` finds.

    Returns:
        The rows, with the index "row" counting from 1 (data rows, not lines of the file).

    Raises:
        DataFileNotFoundError, UnsupportedTableError, TableEncodingError, MalformedRowError,
        NoRowsError: the file is missing, of another format, not in the encoding, not well-formed
            at a line, or holds no rows.
        ArgumentError: `delimiter` is no single character, or the file has no separators.
    """
    source = Path(path)
    suffix = source.suffix.lower()
    if not source.exists():
        raise not_found(source)
    checked_delimiter(delimiter, source)
    if source.is_dir():
        table = _read_saved_dataset(source)
    elif suffix in SEPARATORS:
        text = _read_text(source, encoding)
        table = _parse_delimited(text, source=source, delimiter=delimiter)
    elif suffix in _JSON_SUFFIXES:
        table = _parse_json(_read_text(source, encoding), source)
    elif suffix == ".parquet":
        table = _read_parquet(source)
    else:
        raise UnsupportedTableError(f"{source} is no table that can be read: use {_SUPPORTED}.")
    if len(table) == 0:
        raise NoRowsError(f"{source} holds no rows.")
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table


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


def _read_text(source: Path, encoding: str | None) -> str:
    raw = source.read_bytes()
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


def _parse_delimited(text: str, *, source: Path, delimiter: str | None) -> pd.DataFrame:
    lines = io.StringIO(text, newline="")
    separator = find_separator(lines, source=source, delimiter=delimiter)
    lines.seek(0)
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
        return _as_written([checked_record(v, f"{source}, record {n}") for n, v in values])
    # Not splitlines: U+2028 and its like may stand inside JSON strings.
    return _as_written([record for _, record in json_records(text.split("\n"), source=source)])


def _as_written(rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Rows, or columns by name, as a table; as plain objects, so that pandas changes no cell."""
    return pd.DataFrame(rows, dtype=object)


def _read_parquet(source: Path) -> pd.DataFrame:
    try:
        with pq.ParquetFile(source) as file:
            table = file.read()
    except (OSError, ValueError, pa.ArrowException) as error:  # ArrowInvalid is a ValueError
        raise UnsupportedTableError(f"{source} is not a Parquet file: {error}") from error
    return _typed_table(table, source)


def _typed_table(table: pa.Table, source: Path | str) -> pd.DataFrame:
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MalformedRowError(f"{source} has {', '.join(map(repr, twice))} more than once.")
    try:
        return _as_written(typed_columns(table))
    except (OverflowError, ValueError) as error:  # a date after the year 9999, text not UTF-8
        raise MalformedRowError(f"{source} holds a cell that Python cannot: {error}.") from error


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
