"""Tables read and written a chunk at a time, each row kept as it was written.

For `read_table`, what matters is what the rows mean; here it is that a program gets its own rows
back: a CSV cell to the letter, a JSON record with its own keys, a Parquet column with its own type.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from lora_fsdp.data.formats.compressed import TableFile, table_file
from lora_fsdp.data.formats.labelling import refuse_token_labels
from lora_fsdp.data.formats.nested import with_paths
from lora_fsdp.data.formats.records import (
    delimited_records,
    json_records,
    not_found,
    text_lines,
    wrong_encoding,
)
from lora_fsdp.data.formats.separators import (
    SEPARATORS,
    TEXT_LINES,
    checked_delimiter,
    find_separator,
)
from lora_fsdp.data.formats.spreadsheets import (
    SPREADSHEETS,
    refuse_other_spreadsheet,
    sheet_rows,
    write_sheet,
)
from lora_fsdp.data.formats.typed_cells import typed_columns
from lora_fsdp.errors import ArgumentError, TableEncodingError, UnsupportedTableError

_CHUNK = 1 << 20


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

    def __init__(self, file: TableFile, *, encoding: str | None = None) -> None:
        self.file = file
        self.path = file.path
        self.encoding = encoding or "utf-8-sig"

    @property
    def output_suffix(self) -> str:
        """How the name of an output ends: it is packed as the input is, but for archives."""
        packing = "" if self.file.packing == ".zip" else self.file.packing
        return f"{self.file.suffix}{packing}"

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
        self.file.write(self._bytes_of(parts), path)

    def _bytes_of(self, parts: Iterable[Path]) -> Iterator[bytes]:
        for number, part in enumerate(parts):
            with part.open("rb") as file:
                if number:
                    self._skip_header(file)
                while read := file.read(_CHUNK):
                    yield read

    def _skip_header(self, file: BinaryIO) -> None:  # noqa: B027 (most formats have none)
        """Read past what only the first part keeps."""


class DelimitedStream(TableStream):
    """CSV and TSV. Cells are text to the letter."""

    def __init__(
        self, file: TableFile, *, delimiter: str | None = None, encoding: str | None = None
    ) -> None:
        super().__init__(file, encoding=encoding)
        with _open_text(file, self.encoding, newline="") as lines:
            self.separator = find_separator(
                lines, source=file.path, suffix=file.suffix, delimiter=delimiter
            )

    def chunks(self, size: int) -> Iterator[Chunk]:
        with _open_text(self.file, self.encoding, newline="") as file:
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


class TextLinesStream(TableStream):
    """One text a line, the column "text" of a CSV file that is written."""

    separator = ","

    @property
    def output_suffix(self) -> str:
        """A table, which a file of texts is not."""
        return ".csv"

    def chunks(self, size: int) -> Iterator[Chunk]:
        with _open_text(self.file, self.encoding, newline="") as file:
            for first, chunk in _batches(text_lines(file), size):
                yield Chunk(first, chunk, ["text"])

    def records(self, chunk: Chunk) -> list[dict[str, Any]]:
        return [{"text": text} for text in chunk.rows]

    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]], path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*chunk.columns, *added])
            for text, further in zip(chunk.rows, _records(added, len(chunk)), strict=True):
                writer.writerow([text, *("" if v is None else v for v in further.values())])

    def join(self, parts: Iterable[Path], path: Path) -> None:
        with path.open("wb") as joined:
            joined.writelines(self._bytes_of(parts))

    def _skip_header(self, file: BinaryIO) -> None:
        file.readline()


class JsonLinesStream(TableStream):
    """JSON Lines. Each line stays as it is written, with further keys at its end."""

    def chunks(self, size: int) -> Iterator[Chunk]:
        with _open_text(self.file, self.encoding, newline="\n") as file:
            for first, chunk in _batches(json_records(file, source=self.path), size):
                keys = dict.fromkeys(key for _, row in chunk for key in row)
                yield Chunk(first, chunk, list(keys))

    def records(self, chunk: Chunk) -> list[dict[str, Any]]:
        return [with_paths({n: row.get(n) for n in chunk.columns}) for _, row in chunk.rows]

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
        rows = zip(*columns.values(), strict=True)
        return [with_paths(dict(zip(columns, row, strict=True))) for row in rows]

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


class SpreadsheetStream(TableStream):
    """A workbook's sheet. Cells keep their values; the output has no formats of their own."""

    def __init__(self, file: TableFile, *, sheet: str | None = None) -> None:
        super().__init__(file)
        self._columns, self._rows = sheet_rows(file.path, sheet=sheet)

    def chunks(self, size: int) -> Iterator[Chunk]:
        for first, chunk in _batches(iter(self._rows), size):
            yield Chunk(first, chunk, self._columns)

    def records(self, chunk: Chunk) -> list[dict[str, Any]]:
        return [dict(row) for row in chunk.rows]

    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]], path: Path) -> None:
        rows = zip(chunk.rows, _records(added, len(chunk)), strict=True)
        columns = [*chunk.columns, *added]
        write_sheet(columns, ([*row.values(), *new.values()] for row, new in rows), path)

    def join(self, parts: Iterable[Path], path: Path) -> None:
        columns: list[str] = []
        rows: list[Sequence[Any]] = []
        for part in parts:
            columns, found = sheet_rows(part)
            rows += [list(row.values()) for row in found]
        write_sheet(columns, rows, path)


# The new columns that hold texts and not probabilities.
_TEXT_COLUMNS = ("predicted_label", "predicted_choice", "choice_probabilities", "predicted_text")


def open_stream(
    path: str | Path,
    *,
    encoding: str | None = None,
    delimiter: str | None = None,
    sheet: str | None = None,
) -> TableStream:
    """The table in `path`, by its suffix: .csv, .tsv, .jsonl, .ndjson, .parquet, .xlsx, .txt.

    Text files may be packed (.gz, .bz2, .xz, .zip of one table).

    Args:
        path: the file.
        encoding: of a text file; `None` = UTF-8, or UTF-16 where the file's mark says so. Unlike in
            `read_table` nothing is guessed, since only a part of the file is seen at a time.
        delimiter: between the cells of CSV or TSV; `None` = what `find_separator` finds.
        sheet: of a workbook with several.

    Raises:
        ArgumentError: `delimiter` is no single character, or the file has no separators; `sheet`
            is none of the workbook's, or is needed.
        DataFileNotFoundError, UnsupportedTableError, TableEncodingError: the file is missing, of
            another format, or the encoding does not exist.
    """
    source = Path(path)
    if not source.is_file():
        raise not_found(source)
    file = table_file(source)
    checked_delimiter(delimiter, source, suffix=file.suffix)
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise TableEncodingError(f"{source}: there is no encoding {encoding!r}.") from error
    if sheet is not None and file.suffix not in SPREADSHEETS:
        raise ArgumentError(f"--sheet {sheet!r} is for workbooks (.xlsx), and {source} is none.")
    encoding = encoding or _encoding_of_mark(file)
    if file.suffix in (*SEPARATORS, TEXT_LINES):
        stream = DelimitedStream(file, delimiter=delimiter, encoding=encoding)
        return stream if stream.separator else TextLinesStream(file, encoding=encoding)
    if file.suffix in (".jsonl", ".ndjson"):
        return JsonLinesStream(file, encoding=encoding)
    if file.suffix == ".parquet" and not file.packing:
        return ParquetStream(file)
    if file.suffix in SPREADSHEETS and not file.packing:
        return SpreadsheetStream(file, sheet=sheet)
    refuse_token_labels(source, file.suffix)
    refuse_other_spreadsheet(source, file.suffix)
    raise UnsupportedTableError(
        f"{source} cannot be read in chunks: use .csv, .tsv, .txt, .jsonl, .ndjson (also .gz, "
        ".zip), .xlsx or .parquet."
    )


def _encoding_of_mark(file: TableFile) -> str | None:
    """UTF-16, which Excel's "Unicode text" is in, if the file's first bytes say so."""
    if file.suffix not in (*SEPARATORS, TEXT_LINES, ".jsonl", ".ndjson"):
        return None
    with file.open() as opened:
        return "utf-16" if opened.read(2) in (b"\xff\xfe", b"\xfe\xff") else None


@contextmanager
def _open_text(file: TableFile, encoding: str, *, newline: str) -> Iterator[TextIO]:
    try:
        with file.open() as raw:
            yield io.TextIOWrapper(raw, encoding=encoding, newline=newline)
    except UnicodeDecodeError as error:
        raise wrong_encoding(file.path, encoding, error) from error


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
