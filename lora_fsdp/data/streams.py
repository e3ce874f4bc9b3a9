"""Tables read and written a chunk at a time, each row kept as it was written.

For `read_table`, what matters is what the rows mean; here it is that a program gets its own rows
back: a CSV cell to the letter, a JSON record with its own keys, a Parquet column with its own type.
"""

from __future__ import annotations

import codecs
import csv
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from lora_fsdp.data.records import (
    delimited_records,
    json_records,
    not_found,
    wrong_encoding,
)
from lora_fsdp.data.separators import SEPARATORS, checked_delimiter, find_separator
from lora_fsdp.data.typed_cells import typed_columns
from lora_fsdp.errors import TableEncodingError, UnsupportedTableError


@dataclass(frozen=True)
class Chunk:
    """Some rows of a table.

    Attributes:
        first: number of its first row (1 = first data row).
        rows: the rows in their file's own form.
        columns: the table's columns (of JSON Lines: the keys of this chunk).
    """

    first: int
    rows: Any
    columns: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)


class TableStream(ABC):
    """A table file that is read and written in chunks; one subclass for each format.

    Attributes:
        separator: what stands between the cells; "" in formats without.
    """

    separator: str = ""

    def __init__(self, path: Path, *, encoding: str | None = None) -> None:
        self.path = path
        self.encoding = encoding or "utf-8-sig"

    @abstractmethod
    def chunks(self, size: int) -> Iterator[Chunk]:
        """The rows, `size` at a time."""

    @abstractmethod
    def records(self, chunk: Chunk) -> list[dict[str, Any]]:
        """The rows of a chunk by column; `None` where a row has no value."""

    @abstractmethod
    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]], path: Path) -> None:
        """Write a chunk with further columns, as a file of its own."""

    def join(self, parts: Iterable[Path], path: Path) -> None:
        """Write the files of `write` as one."""
        with path.open("wb") as joined:
            for number, part in enumerate(parts):
                with part.open("rb") as file:
                    if number:
                        self._skip_header(file)
                    shutil.copyfileobj(file, joined)

    def _skip_header(self, file: BinaryIO) -> None:  # noqa: B027 (most formats have none)
        """Read past what only the first part keeps."""


class DelimitedStream(TableStream):
    """CSV and TSV. Cells are text to the letter."""

    def __init__(
        self, path: Path, *, delimiter: str | None = None, encoding: str | None = None
    ) -> None:
        super().__init__(path, encoding=encoding)
        with _open_text(path, self.encoding, newline="") as file:
            self.separator = find_separator(file, source=path, delimiter=delimiter)

    def chunks(self, size: int) -> Iterator[Chunk]:
        with _open_text(self.path, self.encoding, newline="") as file:
            rows = delimited_records(file, source=self.path, separator=self.separator)
            header = next(rows)
            for first, chunk in _batches(rows, size):
                yield Chunk(first, chunk, header)

    def records(self, chunk: Chunk) -> list[dict[str, Any]]:
        return [dict(zip(chunk.columns, row, strict=True)) for row in chunk.rows]

    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]], path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=self.separator, lineterminator="\n")
            writer.writerow([*chunk.columns, *added])
            for row, further in zip(chunk.rows, _records(added, len(chunk)), strict=True):
                writer.writerow([*row, *("" if v is None else v for v in further.values())])

    def _skip_header(self, file: BinaryIO) -> None:
        # A header may hold line breaks inside quotes: as many lines as it took.
        lines = (line.decode("utf-8") for line in iter(file.readline, b""))
        next(csv.reader(lines, delimiter=self.separator))


class JsonLinesStream(TableStream):
    """JSON Lines. Each line stays as it is written, with further keys at its end."""

    def chunks(self, size: int) -> Iterator[Chunk]:
        with _open_text(self.path, self.encoding, newline="\n") as file:
            for first, chunk in _batches(json_records(file, source=self.path), size):
                keys = dict.fromkeys(key for _, row in chunk for key in row)
                yield Chunk(first, chunk, list(keys))

    def records(self, chunk: Chunk) -> list[dict[str, Any]]:
        return [{name: row.get(name) for name in chunk.columns} for _, row in chunk.rows]

    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]], path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for (line, row), new in zip(chunk.rows, _records(added, len(chunk)), strict=True):
                further = json.dumps(new, ensure_ascii=False)[1:]
                file.write(f"{line[:-1]}{', ' if row else ''}{further}\n")


class ParquetStream(TableStream):
    """Parquet. Columns keep their types."""

    def chunks(self, size: int) -> Iterator[Chunk]:
        try:
            file = pq.ParquetFile(self.path)
        except pa.ArrowInvalid as error:
            raise UnsupportedTableError(f"{self.path} is not a Parquet file: {error}") from error
        first = 1
        with file:
            # Batches end at the file's row groups, too; chunks must not depend on that.
            left: list[pa.RecordBatch] = []
            for batch in file.iter_batches(batch_size=size):
                left.append(batch)
                table = pa.Table.from_batches(left)
                while len(table) >= size:
                    yield Chunk(first, table.slice(0, size), table.column_names)
                    first, table = first + size, table.slice(size)
                left = table.to_batches()
            if left and (table := pa.Table.from_batches(left)).num_rows:
                yield Chunk(first, table, table.column_names)

    def records(self, chunk: Chunk) -> list[dict[str, Any]]:
        columns = typed_columns(chunk.rows)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]], path: Path) -> None:
        table = chunk.rows
        for name, values in added.items():
            # Said outright: a chunk may hold nothing but missing values.
            text = name.endswith(_TEXT_COLUMNS) and "/" not in name
            kind = pa.string() if text else pa.float64()
            table = table.append_column(name, pa.array(values, type=kind))
        pq.write_table(table, path)

    def join(self, parts: Iterable[Path], path: Path) -> None:
        writer: pq.ParquetWriter | None = None
        try:
            for part in parts:
                table = pq.read_table(part)
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


# The new columns that hold texts and not probabilities.
_TEXT_COLUMNS = ("predicted_label", "predicted_choice", "choice_probabilities", "predicted_text")


def open_stream(
    path: str | Path, *, encoding: str | None = None, delimiter: str | None = None
) -> TableStream:
    """The table in `path`, by its suffix: .csv, .tsv, .jsonl, .ndjson, .parquet.

    Args:
        path: the file.
        encoding: of a text file; `None` = UTF-8. Unlike in `read_table` nothing is guessed, since
            only a part of the file is seen at a time.
        delimiter: between the cells of CSV or TSV; `None` = what `find_separator` finds.

    Raises:
        ArgumentError: `delimiter` is no single character, or the file has no separators.
        DataFileNotFoundError, UnsupportedTableError, TableEncodingError: the file is missing, of
            another format, or the encoding does not exist.
    """
    source = Path(path)
    suffix = source.suffix.lower()
    if not source.is_file():
        raise not_found(source)
    checked_delimiter(delimiter, source)
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise TableEncodingError(f"{source}: there is no encoding {encoding!r}.") from error
    if suffix in SEPARATORS:
        return DelimitedStream(source, delimiter=delimiter, encoding=encoding)
    if suffix in (".jsonl", ".ndjson"):
        return JsonLinesStream(source, encoding=encoding)
    if suffix == ".parquet":
        return ParquetStream(source)
    raise UnsupportedTableError(
        f"{source} cannot be read in chunks: use .csv, .tsv, .jsonl, .ndjson or .parquet."
    )


@contextmanager
def _open_text(path: Path, encoding: str, *, newline: str) -> Iterator[TextIO]:
    try:
        with path.open(encoding=encoding, newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise wrong_encoding(path, encoding, error) from error


def _batches(rows: Iterator[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    first, batch = 1, []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield first, batch
            first, batch = first + size, []
    if batch:
        yield first, batch


def _records(added: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    return [{name: values[place] for name, values in added.items()} for place in range(count)]
