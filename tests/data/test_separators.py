"""Separators of CSV and TSV. Run: python -m pytest tests/data/test_separators.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_fsdp.data.streams import open_stream
from lora_fsdp.data.tables import read_table
from lora_fsdp.errors import ArgumentError, MalformedRowError

ROWS = [("text", "label"), ("one, two", "x"), ('says "a|b"', "y"), ("1,5\n", "x")]


def write(path: Path, separator: str, *, first: str = "") -> Path:
    def cell(text: str) -> str:
        quoted = text.replace('"', '""')
        return f'"{quoted}"' if set(text) & {separator, '"', "\n"} else text

    lines = [separator.join(map(cell, row)) for row in ROWS]
    path.write_text(first + "\n".join(lines) + "\n", newline="")
    return path


def cells(path: Path, *, delimiter: str | None = None) -> list[tuple[str, str]]:
    """By the table and by the stream, which must agree."""
    table = read_table(path, delimiter=delimiter)
    stream = open_stream(path, delimiter=delimiter)
    (chunk,) = stream.chunks(10)
    assert stream.records(chunk) == table.to_dict("records")
    return [tuple(table.columns), *table.itertuples(index=False, name=None)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separator_is_found(tmp_path: Path, suffix: str, separator: str) -> None:
    assert cells(write(tmp_path / f"data{suffix}", separator)) == ROWS


@pytest.mark.parametrize("separator", [";", ",", "\t", "|", "^"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_of_excel(tmp_path: Path, separator: str, end: str, mark: str) -> None:
    path = write(tmp_path / "data.csv", separator, first=f"{mark}sep={separator}{end}")
    assert cells(path) == ROWS


def test_lines_after_that_of_excel_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("sep=;\na;b\n1;2\n1\n")
    with pytest.raises(MalformedRowError, match=r"line 4: 1 fields.*--delimiter"):
        read_table(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("separator", "named"), [("^", "^"), (" ", " "), ("\t", "tab"), ("\t", "\\t"), (";", ";")]
)
def test_separator_is_named(tmp_path: Path, separator: str, named: str) -> None:
    expected = [tuple(cell for cell in row) for row in ROWS]
    assert cells(write(tmp_path / "data.csv", separator), delimiter=named) == expected


@pytest.mark.parametrize("named", ["", ";;", '"', "\n", "semicolon"])
def test_what_is_no_separator(tmp_path: Path, named: str) -> None:
    path = write(tmp_path / "data.csv", ";")
    for read in (read_table, open_stream):
        with pytest.raises(ArgumentError, match="give the one character between cells"):
            read(path, delimiter=named)


def test_delimiter_of_a_file_without_separators(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    for read in (read_table, open_stream):
        with pytest.raises(ArgumentError, match=r"is for \.csv, \.tsv, .* and \.txt"):
            read(tmp_path / "data.jsonl", delimiter=";")


def test_two_that_fit_are_named(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a;b|c\n1;2|3\n")
    with pytest.raises(MalformedRowError, match=r"';' or '\|'.*--delimiter"):
        read_table(tmp_path / "data.csv")
    assert read_table(tmp_path / "data.csv", delimiter="|").columns.tolist() == ["a;b", "c"]


def test_one_column_stays_one(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("what; why\nplain text\nmore; of; it\n")
    assert read_table(tmp_path / "data.csv")["what; why"].tolist() == ["plain text", "more; of; it"]


def test_output_keeps_the_separator(tmp_path: Path) -> None:
    stream = open_stream(write(tmp_path / "data.csv", ";", first="sep=;\n"))
    parts = []
    for chunk in stream.chunks(2):
        parts.append(tmp_path / f"part{chunk.first}.csv")
        stream.write(chunk, {"predicted_label": ["p"] * len(chunk)}, parts[-1])
    stream.join(parts, tmp_path / "out.csv")
    assert cells(tmp_path / "out.csv") == [
        (*row, "p" if place else "predicted_label") for place, row in enumerate(ROWS)
    ]
