"""Tables in the forms that people have them. Run: python -m pytest tests/data/test_formats.py"""

from __future__ import annotations

import bz2
import datetime as dt
import gzip
import json
import logging
import lzma
import os
import zipfile
from pathlib import Path
from typing import ClassVar

import datasets
import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_fsdp import get_task
from lora_fsdp.data.streams import open_stream
from lora_fsdp.data.tables import read_table
from lora_fsdp.errors import (
    ArgumentError,
    DataFileNotFoundError,
    DownloadError,
    MalformedRowError,
    NoRowsError,
    UnsafeFileError,
    UnsupportedTableError,
)
from lora_fsdp.tasks.cells import cell_text

CSV = 'text,label\n007,NA\n"a, b",1.50\n'
ROWS = [["007", "NA"], ["a, b", "1.50"]]


def cells(table: pd.DataFrame) -> list[list[object]]:
    return table.to_numpy().tolist()


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def stream_rows(path: Path, **options: str) -> list[dict[str, object]]:
    stream = open_stream(path, **options)
    return [row for chunk in stream.chunks(2) for row in stream.records(chunk)]


def workbook(path: Path, **sheets: list[list[object]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


class TestPacked:
    PACKINGS: ClassVar = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}

    @pytest.mark.parametrize("packing", PACKINGS)
    def test_one_file(self, tmp_path, packing):
        path = written(tmp_path / f"a.csv{packing}", self.PACKINGS[packing](CSV.encode()))
        assert cells(read_table(path)) == ROWS
        assert [list(row.values()) for row in stream_rows(path)] == ROWS

    def test_jsonl_and_parquet(self, tmp_path):
        lines = '{"text": "a", "label": 2}\n{"text": "b"}\n'
        path = written(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode()))
        assert cells(read_table(path))[0] == ["a", 2]
        pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "b.parquet")
        packed = gzip.compress((tmp_path / "b.parquet").read_bytes())
        assert cells(read_table(written(tmp_path / "b.parquet.gz", packed))) == [["a"]]

    def archive(self, path, **files):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return path

    def test_zip_of_one_table(self, tmp_path):
        files = {"inner/a.csv": CSV, "__MACOSX/inner/._a.csv": "x", "inner/.DS_Store": "x"}
        path = self.archive(tmp_path / "a.zip", **files)
        assert cells(read_table(path)) == ROWS
        assert [list(row.values()) for row in stream_rows(path)] == ROWS
        assert open_stream(path).output_suffix == ".csv"

    def test_zip_of_several(self, tmp_path):
        path = self.archive(tmp_path / "a.zip", **{"a.csv": CSV, "b.csv": CSV})
        for read in (read_table, open_stream):
            with pytest.raises(UnsupportedTableError, match=r"2 files \('a.csv', 'b.csv'\)"):
                read(path)

    def test_zip_that_is_no_zip(self, tmp_path):
        with pytest.raises(UnsupportedTableError, match="cannot be unpacked"):
            read_table(written(tmp_path / "a.zip", b"no"))

    @pytest.mark.parametrize(
        "contents", [b"no", gzip.compress(CSV.encode())[:-9], b""], ids=["no gzip", "cut", "empty"]
    )
    def test_damaged(self, tmp_path, contents):
        path = written(tmp_path / "a.csv.gz", contents)
        for read in (read_table, stream_rows):
            with pytest.raises((UnsupportedTableError, NoRowsError)):
                read(path)

    def test_bomb(self, tmp_path, monkeypatch):
        monkeypatch.setattr("lora_fsdp.data.formats.compressed._MOST_BYTES", 1 << 20)
        path = written(tmp_path / "a.csv.gz", gzip.compress(b"text\n" + b"a" * (1 << 24)))
        with pytest.raises(UnsafeFileError, match="bytes and unpacks to"):
            read_table(path)

    def test_answers_are_packed_as_the_rows_are(self, tmp_path):
        stream = open_stream(written(tmp_path / "a.csv.gz", gzip.compress(CSV.encode())))
        assert stream.output_suffix == ".csv.gz"
        parts = [tmp_path / f"{n}" for n in range(2)]
        for chunk, part in zip(stream.chunks(1), parts, strict=True):
            stream.write(chunk, {"new": ["x"]}, part)
        stream.join(parts, tmp_path / "out.csv.gz")
        assert cells(read_table(tmp_path / "out.csv.gz")) == [[*row, "x"] for row in ROWS]


class TestSpreadsheets:
    def test_cells_as_stored(self, tmp_path):
        row = [2, 2.5, 10**14 + 1, "007", "NA", True, dt.date(2024, 1, 2), None]
        path = workbook(tmp_path / "a.xlsx", data=[[f"c{n}" for n in range(8)], row])
        found = [cell_text(cell) for cell in cells(read_table(path))[0]]
        wanted = ["2", "2.5", "100000000000001", "007", "NA", "True", "2024-01-02", ""]
        assert found == wanted
        assert [cell_text(cell) for cell in stream_rows(path)[0].values()] == wanted

    def test_a_number_with_leading_zeros(self, tmp_path):
        book = openpyxl.Workbook()
        book.active.append(["text", "label"])
        book.active.append(["a", 7])
        book.active["B2"].number_format = "000"
        book.save(tmp_path / "a.xlsx")
        assert cells(read_table(tmp_path / "a.xlsx")) == [["a", "007"]]

    def test_empty_rows_and_columns_are_none(self, tmp_path):
        rows = [[None, None], [None, "text", "label", None], [], [None, "a", "b"], [None, "c", 1]]
        path = workbook(tmp_path / "a.xlsx", data=rows, empty=[])
        assert list(read_table(path).columns) == ["text", "label"]
        assert cells(read_table(path)) == [["a", "b"], ["c", 1]]

    def test_several_sheets(self, tmp_path):
        path = workbook(tmp_path / "a.xlsx", May=[["text"], ["a"]], June=[["text"], ["b"]])
        for read in (read_table, open_stream):
            with pytest.raises(ArgumentError, match="sheets 'May', 'June': name one with --sheet"):
                read(path)
            with pytest.raises(ArgumentError, match=r"no sheet 'Jun'. Did you mean 'June'\?"):
                read(path, sheet="Jun")
        assert cells(read_table(path, sheet="June")) == [["b"]]
        assert stream_rows(path, sheet="June") == [{"text": "b"}]

    def test_sheet_of_a_file_that_has_none(self, tmp_path):
        path = written(tmp_path / "a.csv", CSV)
        for read in (read_table, open_stream):
            with pytest.raises(ArgumentError, match="--sheet 'June' is for workbooks"):
                read(path, sheet="June")

    def test_formula_without_a_value(self, tmp_path):
        path = workbook(tmp_path / "a.xlsx", data=[["text", "label"], ["a", "=A2"]])
        with pytest.raises(MalformedRowError, match="cell B2: the formula's value is not stored"):
            read_table(path)

    @pytest.mark.parametrize(
        ("rows", "words"),
        [([], "is empty"), ([["text"]], "holds no rows"), ([["a", "a"], [1, 2]], "more than once")],
    )
    def test_no_table(self, tmp_path, rows, words):
        with pytest.raises((NoRowsError, MalformedRowError), match=words):
            read_table(workbook(tmp_path / "a.xlsx", data=rows))

    @pytest.mark.parametrize("name", ["a.xls", "a.ods", "a.xlsb"])
    def test_other_kinds(self, tmp_path, name):
        for read in (read_table, open_stream):
            with pytest.raises(UnsupportedTableError, match=r"save it as \.xlsx or as CSV"):
                read(written(tmp_path / name, b"x"))

    def test_no_workbook(self, tmp_path):
        with pytest.raises(UnsupportedTableError, match=r"is no \.xlsx workbook"):
            read_table(written(tmp_path / "a.xlsx", b"PK\x03\x04"))

    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
        with pytest.raises(ImportError, match=r"pip install 'lora-fsdp\[excel\]'"):
            read_table(written(tmp_path / "a.xlsx", b"x"))

    def test_answers_come_back_as_a_workbook(self, tmp_path):
        rows = [["text", "n"], ["=1+1", 2], ["b", dt.date(2024, 1, 2)], ["c", None]]
        book = workbook(tmp_path / "in.xlsx", data=rows)
        sheet = openpyxl.load_workbook(book)
        sheet.active["A2"].data_type = "s"
        sheet.save(book)
        stream = open_stream(book)
        parts = [tmp_path / "1.xlsx", tmp_path / "2.xlsx"]
        for chunk, part in zip(stream.chunks(2), parts, strict=True):
            stream.write(chunk, {"label": ["x"] * len(chunk)}, part)
        stream.join(parts, tmp_path / "out.xlsx")
        again = read_table(tmp_path / "out.xlsx")
        assert list(again.columns) == ["text", "n", "label"]
        assert [[cell_text(c) for c in row] for row in cells(again)] == [
            ["=1+1", "2", "x"], ["b", "2024-01-02", "x"], ["c", "", "x"]]  # fmt: skip


class TestTexts:
    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    @pytest.mark.parametrize("separator", [";", "\t", "|"])
    def test_separators_with_a_mark(self, tmp_path, separator, mark):
        text = mark + CSV.replace(",", separator).replace(f"a{separator} b", "a, b")
        path = written(tmp_path / "a.csv", text)
        assert cells(read_table(path)) == ROWS
        assert [list(row.values()) for row in stream_rows(path)] == ROWS

    @pytest.mark.parametrize(("suffix", "separator"), [(".tab", "\t"), (".psv", "|")])
    def test_suffixes_that_say_it(self, tmp_path, suffix, separator):
        path = written(tmp_path / f"a{suffix}", f"text{separator}label\na{separator}b\n")
        assert cells(read_table(path)) == [["a", "b"]]

    def test_unicode_text_of_excel(self, tmp_path):
        path = written(tmp_path / "a.txt", "text\tlabel\r\né\tb\r\n".encode("utf-16"))
        assert cells(read_table(path, delimiter="tab")) == [["é", "b"]]
        assert stream_rows(path, delimiter="tab") == [{"text": "é", "label": "b"}]

    def test_one_text_a_line(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        path = written(tmp_path / "a.txt", "one, two\r\n\n\tthree \nNA")
        assert cells(read_table(path)) == [["one, two"], ["\tthree "], ["NA"]]
        assert "one text a line (3)" in caplog.text
        assert [row["text"] for row in stream_rows(path)] == ["one, two", "\tthree ", "NA"]

    def test_a_table_in_a_text_file(self, tmp_path):
        path = written(tmp_path / "a.txt", "sep=;\ntext;label\na;b\n")
        assert cells(read_table(path)) == [["a", "b"]]
        assert stream_rows(path) == [{"text": "a", "label": "b"}]

    def test_answers_to_lines_are_a_table(self, tmp_path):
        stream = open_stream(written(tmp_path / "a.txt", 'a "b"\nc, d\n'))
        assert stream.output_suffix == ".csv"
        parts = [tmp_path / "1", tmp_path / "2"]
        for chunk, part in zip(stream.chunks(1), parts, strict=True):
            stream.write(chunk, {"predicted_label": ["x"]}, part)
        stream.join(parts, tmp_path / "out.csv")
        assert cells(read_table(tmp_path / "out.csv")) == [['a "b"', "x"], ["c, d", "x"]]

    @pytest.mark.parametrize("name", ["a.conll", "a.conllu", "a.bio"])
    def test_labels_of_words_are_refused(self, tmp_path, name):
        path = written(tmp_path / name, "EU B-ORG\nrejects O\n")
        for read in (read_table, open_stream):
            with pytest.raises(UnsupportedTableError, match=r"a label for each word \(CoNLL\)"):
                read(path)


class TestNested:
    ROWS = ('{"review": {"body": "a", "stars": 5, "by": {"id": 10}}, "x.y": 1}',
            '{"review": null, "x": {"y": 2}}', '{"review": {"body": "b"}}')  # fmt: skip

    def test_paths_are_columns(self, tmp_path):
        path = written(tmp_path / "a.jsonl", "\n".join(self.ROWS))
        table = read_table(path, nested=True)
        assert list(table.columns) == ["review", "x.y", "x", "review.body", "review.stars",
                                       "review.by", "review.by.id"]  # fmt: skip
        assert [cell_text(cell) for cell in table["review.body"]] == ["a", "", "b"]
        assert [cell_text(cell) for cell in table["review.by.id"]] == ["10", "", ""]
        assert [cell_text(cell) for cell in table["x.y"]] == ["1", "", ""]  # its own column
        assert list(read_table(path).columns) == ["review", "x.y", "x"]

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_streams_have_them_too(self, tmp_path, kind):
        rows = [{"review": {"body": "a", "stars": 5}}, {"review": {"body": "b", "stars": None}}]
        if kind == "parquet":
            path = tmp_path / "a.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
        assert [row["review.body"] for row in stream_rows(path)] == ["a", "b"]

    def test_a_task_reads_them(self, tmp_path):
        rows = ('{"review": {"body": "a"}, "meta": {"stars": 5}}',
                '{"review": {"body": "b"}, "meta": {"stars": 4}}')  # fmt: skip
        table = read_table(written(tmp_path / "a.jsonl", "\n".join(rows)), nested=True)
        task = get_task(
            "classification", {"text_column": "review.body", "label_column": "meta.stars"}
        ).bind(table)
        assert task.labels == ("4", "5")

    def test_objects_with_keys_of_their_own_are_no_columns(self, tmp_path):
        rows = [json.dumps({"text": "a", "counts": {f"w{n}": n}}) for n in range(600)]
        path = written(tmp_path / "a.jsonl", "\n".join(rows))
        assert list(read_table(path, nested=True).columns) == ["text", "counts"]


class TestSeveral:
    def folder(self, tmp_path, **files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            written(path, text)
        return tmp_path

    def test_a_pattern_and_a_list(self, tmp_path):
        self.folder(tmp_path, **{"a1.csv": "text,label\n1,x\n", "a2.csv": "label,text\ny,2\n"})
        wanted = [["1", "x"], ["2", "y"]]
        assert cells(read_table(tmp_path / "a*.csv")) == wanted
        names = os.pathsep.join(str(tmp_path / name) for name in ("a1.csv", "a2.csv"))
        table = read_table(names)
        assert cells(table) == wanted
        assert list(table.index) == [1, 2]

    def test_other_columns(self, tmp_path):
        self.folder(tmp_path, **{"a1.csv": "text\n1\n", "a2.csv": "body\n2\n"})
        with pytest.raises(MalformedRowError, match=r"a2\.csv has the columns 'body', and"):
            read_table(tmp_path / "a?.csv")

    def test_a_pattern_without_a_file(self, tmp_path):
        with pytest.raises(DataFileNotFoundError):
            read_table(tmp_path / "b*.csv")

    def test_a_folder_as_on_the_hub(self, tmp_path):
        label = datasets.ClassLabel(names=["no", "yes"])
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        for split, label in (("train", 1), ("test", 0)):
            for part in range(2):
                rows = datasets.Dataset.from_dict(
                    {"text": [f"{split} {part}"], "label": [label]}, features=features
                )
                rows.to_parquet(tmp_path / "data" / f"{split}-0000{part}-of-00002.parquet")
        (tmp_path / "README.md").write_text("x")
        assert cells(read_table(tmp_path)) == [["train 0", "yes"], ["train 1", "yes"]]

    def test_a_folder_of_one_kind(self, tmp_path):
        self.folder(tmp_path, **{"x/a.csv": CSV, "b.csv": CSV, ".hidden/c.csv": "x"})
        assert len(read_table(tmp_path)) == 4

    def test_a_folder_of_several_kinds(self, tmp_path):
        self.folder(tmp_path, **{"a.csv": CSV, "b.jsonl": "{}"})
        with pytest.raises(UnsupportedTableError, match="several formats"):
            read_table(tmp_path)

    def test_a_folder_without_the_rows_to_train_on(self, tmp_path):
        self.folder(tmp_path, **{"test.csv": CSV, "validation.csv": CSV})
        with pytest.raises(UnsupportedTableError, match="nothing called train"):
            read_table(tmp_path)

    def test_a_name_on_the_hub_without_a_connection(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        with pytest.raises(DownloadError, match="is no file here, and as a dataset on the Hub"):
            read_table("nobody/no-such-data")

    def test_a_file_that_is_missing_is_no_name_on_the_hub(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir()
        for name in ("data/tweets", "data/tweets.csv", "other/tweets.csv", "./tweets", "tweets"):
            with pytest.raises(DataFileNotFoundError):
                read_table(name)


class TestLabellingTools:
    def lines(self, path, rows):
        return written(path, "\n".join(map(json.dumps, rows)))

    def test_prodigy(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        hashes = {"_input_hash": 1, "_task_hash": 2}
        rows = [
            {"text": "a", "label": "GOOD", "answer": "accept", **hashes},
            {"text": "b", "label": "GOOD", "answer": "reject", **hashes},
            {"text": "c", "label": "GOOD", "answer": "ignore", **hashes},
            {"text": "d", "accept": ["BAD"], "options": [], "answer": "accept", **hashes},
        ]
        table = read_table(self.lines(tmp_path / "a.jsonl", rows))
        assert cells(table[["text", "label"]]) == [["a", "GOOD"], ["d", "BAD"]]
        assert "export of Prodigy: 2 rows; left out 1 rejected, 1 ignored" in caplog.text

    def test_prodigy_that_marked_spans(self, tmp_path):
        spans = [{"start": 0, "end": 1, "label": "ORG"}]
        row = {"text": "a", "spans": spans, "answer": "accept", "_task_hash": 2}
        with pytest.raises(UnsupportedTableError, match="row 1: holds marked spans"):
            read_table(self.lines(tmp_path / "a.jsonl", [row]))

    def test_an_answer_that_is_no_prodigys(self, tmp_path):
        rows = [{"text": "a", "answer": "accept"}, {"text": "b", "answer": "reject"}]
        assert len(read_table(self.lines(tmp_path / "a.jsonl", rows))) == 2

    def studio(self, text, *choices, cancelled=False):
        results = [[{"type": "choices", "from_name": "mood", "to_name": "text",
                     "value": {"choices": list(one)}}] for one in choices]  # fmt: skip
        given = [{"result": one, "was_cancelled": cancelled} for one in results]
        return {"id": 1, "data": {"text": text}, "annotations": given, "predictions": []}

    def test_label_studio(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        rows = [
            self.studio("a", ["good"]),
            self.studio("b", ["bad"], ["bad"]),
            self.studio("c", ["bad"], ["good"]),
            self.studio("d"),
            self.studio("e", ["good"], cancelled=True),
        ]
        table = read_table(written(tmp_path / "a.json", json.dumps(rows)))
        assert table.to_dict("records") == [{"text": "a", "mood": "good"},
                                            {"text": "b", "mood": "bad"}]  # fmt: skip
        assert "1 annotated in several ways, 1 not annotated, 1 skipped" in caplog.text

    def test_label_studio_with_several_choices(self, tmp_path):
        rows = [self.studio("a", ["good"]), self.studio("b", ["bad", "good"])]
        table = read_table(written(tmp_path / "a.json", json.dumps(rows)))
        assert list(table["mood"]) == [["good"], ["bad", "good"]]

    def test_label_studio_that_marked_spans(self, tmp_path):
        row = self.studio("a", ["x"])
        row["annotations"][0]["result"][0]["type"] = "labels"
        with pytest.raises(UnsupportedTableError, match="marked spans"):
            read_table(written(tmp_path / "a.json", json.dumps([row])))

    def test_label_studio_nobody_used(self, tmp_path):
        with pytest.raises(NoRowsError, match=r"without an answered row \(1 not annotated\)"):
            read_table(written(tmp_path / "a.json", json.dumps([self.studio("a")])))

    def test_doccano(self, tmp_path):
        rows = [{"id": 1, "text": "a", "label": ["pos"]}, {"id": 2, "text": "b", "label": []}]
        table = read_table(self.lines(tmp_path / "a.jsonl", rows))
        assert list(table["label"]) == ["pos", None]
        rows[1]["label"] = ["pos", "neg"]
        table = read_table(self.lines(tmp_path / "a.jsonl", rows))
        assert list(table["label"]) == [["pos"], ["pos", "neg"]]

    def test_doccano_that_marked_spans(self, tmp_path):
        row = {"id": 1, "text": "a", "label": [[0, 1, "ORG"]]}
        with pytest.raises(UnsupportedTableError, match="marked spans"):
            read_table(self.lines(tmp_path / "a.jsonl", [row]))

    def test_argilla(self, tmp_path):
        def response(*values, status="submitted"):
            return {"mood": [{"value": v, "user_id": "u", "status": status} for v in values]}

        rows = [
            {"id": "1", "fields": {"text": "a"}, "metadata": {}, "responses": response("good")},
            {"id": "2", "fields": {"text": "b"}, "responses": response("good", "bad")},
            {"id": "3", "fields": {"text": "c"}, "responses": response("bad", status="draft")},
            {"id": "4", "fields": {"text": "d"}, "responses": response("bad", "bad")},
        ]
        table = read_table(written(tmp_path / "a.json", json.dumps(rows)))
        assert cells(table) == [["a", "good"], ["d", "bad"]]

    def test_argilla_as_a_dataset(self, tmp_path):
        rows = [
            {"id": "1", "text": "a", "mood.responses": ["good"], "mood.responses.users": ["u"],
             "mood.responses.status": ["submitted"], "mood.suggestion": None},
            {"id": "2", "text": "b", "mood.responses": None, "mood.responses.users": None,
             "mood.responses.status": None, "mood.suggestion": "bad"},
        ]  # fmt: skip
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        assert cells(read_table(tmp_path / "saved")) == [["a", "good"]]

    def test_one_that_its_tool_would_not_write(self, tmp_path):
        row = {"data": {"text": "a"}, "annotations": [{"result": [{"type": "choices"}]}]}
        with pytest.raises(UnsupportedTableError, match="row 1: not as Label Studio writes it"):
            read_table(written(tmp_path / "a.json", json.dumps([row])))
