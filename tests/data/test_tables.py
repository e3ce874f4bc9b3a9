"""Reading, sampling and hashing tables. Run: python -m pytest tests/data/test_tables.py"""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pandas as pd
import pytest

from lora_fsdp.data.tables import read_table, sample_rows
from lora_fsdp.errors import (
    ArgumentError,
    DataFileNotFoundError,
    MalformedRowError,
    NoRowsError,
    TableEncodingError,
    UnsupportedTableError,
)

TWEETS = Path(__file__).parents[2] / "../shared/data/tweet_emotions.csv"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_cells_are_text_to_the_letter(tmp_path: Path) -> None:
    content = 'text,label\nNA,null\n007,1.0\n"a, ""b""\nc",None\n,\n\nlast,x\n'
    table = read_table(write(tmp_path / "data.csv", content))
    assert table["text"].tolist() == ["NA", "007", 'a, "b"\nc', "", "last"]
    assert table["label"].tolist() == ["null", "1.0", "None", "", "x"]
    assert table.index.tolist() == [1, 2, 3, 4, 5]
    assert table.index.name == "row"


def test_tsv_and_suffix_in_capitals(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "data.TSV", "text\tlabel\na,b\tx\n"))
    assert table.to_dict("records") == [{"text": "a,b", "label": "x"}]


def test_header_is_stripped_and_blank_names_get_one(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "data.csv", "v1, v2,,\na,b,,\n"))
    assert list(table.columns) == ["v1", "v2", "Unnamed: 2", "Unnamed: 3"]


def test_header_with_a_name_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "text,text\na,b\n")
    with pytest.raises(MalformedRowError, match="line 1: the header names 'text' more than once"):
        read_table(path)


def test_long_field_is_read_and_the_limit_of_csv_restored(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    table = read_table(write(tmp_path / "data.csv", f"text\n{'x' * 200_000}\n"))
    assert len(table["text"][1]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a,b\n"1\n1",2\n1,2,3\n', "line 4: 3 fields where the header has 2"),
        ("a,b\n1,2\n1\n", "line 3: 1 fields where the header has 2"),
        ("a,b\n1,2,3\n", "line 2: 3 fields"),
        ('a,b\n1,2\n1,"open\n3,4\n', "line 3: unexpected end of data"),
        ('a,b\n"x" y,2\n', "line 2: ',' expected after '\"'"),
        ("a,b\n1,2\n1,\0\n", "line 3: NUL byte"),
    ],
)
def test_malformed_rows_are_named_by_line(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "data.csv", content)
    with pytest.raises(MalformedRowError) as caught:
        read_table(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n", "text,label\n"])
def test_file_without_rows(tmp_path: Path, content: str) -> None:
    with pytest.raises(NoRowsError, match=r"data\.csv"):
        read_table(write(tmp_path / "data.csv", content))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1251", "gb18030"])
def test_encoding_is_found(tmp_path: Path, encoding: str) -> None:
    texts = {"gb18030": "今天天气很好,我们去公园玩吧。", "cp1251": "Привет мир, как дела"}
    text = texts.get(encoding, "naïve café, €5 “ok”")
    path = write(tmp_path / "data.csv", f'text,label\n"{text}",x\n'.encode(encoding))
    table = read_table(path)
    assert table["text"][1] == text
    assert list(table.columns) == ["text", "label"]


def test_guessed_encoding_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "plain english about nothing at all\n" * 40
    path = write(tmp_path / "data.csv", f"text\n{rows}naïve café\n".encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        table = read_table(path)
    assert table["text"].iloc[-1] == "naïve café"
    assert "byte offset 1407" in caplog.text
    assert "cp1252, a guess: " in caplog.text
    assert "naïve café" in caplog.text
    assert "--encoding" in caplog.text


def test_unreadable_encoding_names_offset_and_option(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", b"text\nabc\x98\x81\n\xff\xff")
    with pytest.raises(TableEncodingError) as caught:
        read_table(path)
    assert "byte 0x98 at offset 8" in str(caught.value)
    assert "--encoding latin-1" in str(caught.value)


def test_given_encoding_is_not_second_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "text\ncafé\n".encode("latin-1"))
    with pytest.raises(TableEncodingError, match="is not utf-8: byte 0xe9 at offset 8"):
        read_table(path, encoding="utf-8")
    with pytest.raises(TableEncodingError, match="no encoding 'latin-one'"):
        read_table(path, encoding="latin-one")
    assert read_table(path, encoding="latin-1")["text"][1] == "café"


def test_utf_16_without_a_mark_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "text\nabc\n".encode("utf-16-le"))
    with pytest.raises(MalformedRowError, match="--encoding utf-16-le"):
        read_table(path)
    assert read_table(path, encoding="utf-16-le")["text"][1] == "abc"


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    content = '{"text": "NA\\u2028x", "label": 1}\r\n\n{"text": null, "label": 0}\n'
    table = read_table(write(tmp_path / name, content.replace("\\u2028", "\u2028")))
    assert table["text"][1] == "NA\u2028x"
    assert table["text"].isna().tolist() == [False, True]
    assert table["label"].tolist() == [1, 0]


def test_json_list_of_records(tmp_path: Path) -> None:
    rows = [{"text": "2020-01-01", "label": "1"}, {"text": "b", "label": "x"}]
    table = read_table(write(tmp_path / "data.json", json.dumps(rows, indent=1)))
    assert table.to_dict("records") == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": \n', "line 2, column 7: Expecting value"),
        ('{"a": 1}\n[1]\n', "line 2: a row must be a JSON object"),
        ('[{"a": 1},\n 5]', "record 2: a row must be a JSON object"),
        ('[{"a": 1},\n {"a"}]', "line 2, column 6"),
        ('{\n "a": 1\n}', "line 1, column 2"),
        ('{"a": "\\ud83d half"}', "line 1: half a surrogate pair (\\ud8…) in"),
    ],
)
def test_malformed_json(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "data.json", content)
    with pytest.raises(MalformedRowError) as caught:
        read_table(path)
    assert message in str(caught.value)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pd.DataFrame({"text": ["a", "NA"], "label": [0, 1]}, index=[5, 7]).to_parquet(path)
    table = read_table(path)
    assert table["text"].tolist() == ["a", "NA"]
    assert table.index.tolist() == [1, 2]
    with pytest.raises(UnsupportedTableError, match="not a Parquet file"):
        read_table(write(tmp_path / "bad.parquet", "text,label"))


def test_saved_dataset_with_names_for_its_class_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "one")
    table = read_table(tmp_path / "one")
    assert table["label"].tolist()[:2] == ["good", "bad"]
    assert table["label"].isna().tolist() == [False, False, True]


def test_saved_dataset_dict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    train, test = (datasets.Dataset.from_dict({"text": [text]}) for text in ("seen", "unseen"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    with caplog.at_level(logging.INFO):
        assert read_table(tmp_path / "both")["text"].tolist() == ["seen"]
    assert "the splits test, train: reading train" in caplog.text
    assert read_table(tmp_path / "both" / "test")["text"].tolist() == ["unseen"]

    datasets.DatasetDict({"test": test}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(UnsupportedTableError, match=r"splits test and no train.*no_train.test"):
        read_table(tmp_path / "no_train")


def test_unsupported_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedTableError, match=r"data\.docx.*\.csv, \.tsv, .*\.jsonl.*parquet"
    ):
        read_table(write(tmp_path / "data.docx", "x"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnsupportedTableError, match=r"no table \(\.csv.*save_to_disk"):
        read_table(tmp_path / "folder")


def test_missing_file_suggests_its_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tweets.csv", "x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataFileNotFoundError) as caught:
        read_table("tweet.csv")
    assert str(tmp_path / "tweet.csv") in str(caught.value)
    assert f"Did you mean {str(tmp_path / 'tweets.csv')!r}?" in str(caught.value)
    with pytest.raises(DataFileNotFoundError, match="no data file") as caught:
        read_table(tmp_path / "no_folder" / "x.csv")
    assert "Did you mean" not in str(caught.value)


def numbers(count: int) -> pd.DataFrame:
    return pd.DataFrame({"text": [str(n) for n in range(count)]}, index=range(1, count + 1))


def test_sample_is_seeded_ordered_and_nested() -> None:
    table = numbers(100)
    ten = sample_rows(table, max_rows=10, head=None, seed=1)
    assert ten.index.is_monotonic_increasing
    assert len(ten) == 10
    assert ten.equals(sample_rows(table, max_rows=10, head=None, seed=1))
    assert not ten.equals(sample_rows(table, max_rows=10, head=None, seed=2))
    assert set(ten.index) < set(sample_rows(table, max_rows=20, head=None, seed=1).index)


def test_head_and_everything() -> None:
    table = numbers(5)
    assert sample_rows(table, max_rows=None, head=2, seed=0).index.tolist() == [1, 2]
    assert sample_rows(table, max_rows=None, head=None, seed=0).equals(table)
    assert sample_rows(table, max_rows=50, head=None, seed=0).equals(table)


@pytest.mark.parametrize(
    ("max_rows", "head", "message"),
    [(5, 5, "max_rows=5 and head=5"), (0, None, "max_rows=0"), (None, -1, "head=-1")],
)
def test_sample_refuses(max_rows: int | None, head: int | None, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        sample_rows(numbers(5), max_rows=max_rows, head=head, seed=0)


@pytest.mark.skipif(not TWEETS.exists(), reason="needs the article's tweets")
def test_the_tweets_of_the_article_need_no_option(caplog: pytest.LogCaptureFixture) -> None:
    table = read_table(TWEETS)
    assert list(table.columns) == ["tweet_id", "sentiment", "content"]
    assert len(table) == 40_001
    assert caplog.text == ""
