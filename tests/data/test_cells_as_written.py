"""No cell changes its type on its way from a file to a prompt or a target.

Run: python -m pytest tests/data/test_cells_as_written.py
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_fsdp.data.streams import open_stream
from lora_fsdp.data.tables import read_table
from lora_fsdp.tasks import get_task
from lora_fsdp.tasks.cells import cell_text, cell_value, json_text

# A cell as Python has it, and its text; another row's cell of the same column is missing.
TYPED = [
    (2, "2"),
    (10**17 + 1, "100000000000000001"),
    (-(2**63), str(-(2**63))),
    (True, "True"),
    (0.1, "0.1"),
    (100000.0, "100000.0"),
    ("2.50", "2.50"),
    ([1, None, 3], "[1, null, 3]"),
    ({"a": 10**17 + 1, "b": True}, '{"a": 100000000000000001, "b": true}'),
]
ARROW_ONLY = [
    (dt.date(2024, 1, 2), "2024-01-02"),
    (dt.datetime(2024, 1, 2, 3), "2024-01-02 03:00:00"),
    (decimal.Decimal("2.50"), "2.50"),
    ([dt.date(2024, 1, 2)], '["2024-01-02"]'),
]


def jsonl(path: Path, *cells: str) -> Path:
    rows = [f'{{"text": "a{n}", "answer": {cell}}}' for n, cell in enumerate(cells)]
    path.write_text("\n".join(rows) + "\n")
    return path


def saved(folder: Path, kind: str, values: list[Any]) -> Path:
    rows = [{"text": f"a{n}", "answer": value} for n, value in enumerate(values)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
        return folder / "data.parquet"
    if kind == "datasets":
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    cells = [json.dumps(value) for value in values]
    if kind == "json":
        text = ", ".join(f'{{"text": "a{n}", "answer": {cell}}}' for n, cell in enumerate(cells))
        (folder / "data.json").write_text(f"[{text}]")
        return folder / "data.json"
    return jsonl(folder / "data.jsonl", *cells)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "datasets"])
@pytest.mark.parametrize(("value", "text"), TYPED)
def test_missing_cell_changes_no_other(tmp_path: Path, kind: str, value: object, text: str) -> None:
    table = read_table(saved(tmp_path, kind, [value, None]))
    task = get_task("generation")
    kept, dropped = task.drop_bad_rows(table)
    assert dropped == 1
    assert [example.target for example in task.bind(kept).examples(kept)] == [f" {text}"]


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
@pytest.mark.parametrize(("value", "text"), ARROW_ONLY)
def test_types_that_json_lacks(tmp_path: Path, kind: str, value: object, text: str) -> None:
    table = read_table(saved(tmp_path, kind, [value, None]))
    assert [cell_text(cell) for cell in table["answer"]] == [text, ""]


@pytest.mark.parametrize("number", ["2.50", "1e5", "1E-7", "1e400", "0.10000000000000000001"])
def test_decimals_of_json_stay_as_written(tmp_path: Path, number: str) -> None:
    path = jsonl(tmp_path / "data.jsonl", number, f"[{number}]", "null")
    expected = [number, f"[{number}]", ""]
    assert [cell_text(cell) for cell in read_table(path)["answer"]] == expected
    (chunk,) = open_stream(path).chunks(10)
    records = open_stream(path).records(chunk)
    assert [cell_text(row["answer"]) for row in records] == expected
    assert json_text(cell_value(f'{{"a": {number}}}')) == f'{{"a": {number}}}'


@pytest.mark.parametrize("value", [value for value, _ in [*TYPED, *ARROW_ONLY]])
def test_stream_gives_what_the_table_gives(tmp_path: Path, value: object) -> None:
    path = saved(tmp_path, "parquet", [value, None])
    stream = open_stream(path)
    (chunk,) = stream.chunks(10)
    assert [row["answer"] for row in stream.records(chunk)] == read_table(path)["answer"].tolist()


def test_short_floats_have_their_shortest_decimal(tmp_path: Path) -> None:
    columns = {
        "one": pa.array([0.1, None], pa.float32()),
        "half": pa.array(np.array([0.1, 2], np.float16)),
        "many": pa.array([[0.1, None], None], pa.list_(pa.float32())),
        "inside": pa.array([{"a": 0.7}, None], pa.struct([("a", pa.float32())])),
    }
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    table = read_table(tmp_path / "data.parquet").map(cell_text)
    assert table.to_numpy().tolist() == [
        ["0.1", "0.1", "[0.1, null]", '{"a": 0.7}'],
        ["", "2.0", "", ""],
    ]
    assert cell_text(np.float32(0.1)) == "0.1"


def test_optional_number_in_a_prompt(tmp_path: Path) -> None:
    rows = [
        {"instruction": "add one", "input": 3, "output": 4},
        {"instruction": "say a number", "input": None, "output": 7},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = read_table(tmp_path / "data.jsonl")
    first, second = get_task("alpaca").examples(table)
    assert "### Input:\n3\n" in str(first.prompt)
    assert "### Input" not in str(second.prompt)
    assert (first.target, second.target) == ("\n4", "\n7")


def test_extracted_fields_stay_as_written() -> None:
    table = pd.DataFrame({"text": ["a"], "fields": ['{"price": 2.50, "id": 100000000000000001}']})
    (example,) = get_task("extraction").examples(table)
    assert example.target == ' {"price": 2.50, "id": 100000000000000001}'
    typed = pd.DataFrame({"text": ["a"], "fields": [{"on": dt.date(2024, 1, 2), "no": None}]})
    (example,) = get_task("extraction").examples(typed)
    assert example.target == ' {"on": "2024-01-02", "no": null}'


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [([1.0, 2.0, 3.0], 2.0, " 2.0"), ([True, False], True, " True"), (["x", "y"], 1, " y")],
)
def test_answer_that_is_a_choice_to_the_letter(choices: Any, answer: Any, right: str) -> None:
    rows = {"question": ["q"], "choices": [choices], "answer": pd.Series([answer], dtype=object)}
    (example,) = get_task("multiple_choice").examples(pd.DataFrame(rows))
    assert example.target == right


@pytest.mark.parametrize("folder", [False, True])
def test_names_of_classes_are_kept(tmp_path: Path, folder: bool) -> None:
    names = datasets.ClassLabel(names=["anger", "joy"])
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": names,
            "many": datasets.List(names),
            "inside": {"a": names, "n": datasets.Value("int64")},
        }
    )
    columns = {
        "text": ["a", "b", "c", "d"],
        "label": [1, 0, -1, None],
        "many": [[0, 1], [], None, [1]],
        "inside": [{"a": 1, "n": 1}] * 4,
    }
    made = datasets.Dataset.from_dict(columns, features=features)
    path = tmp_path / ("saved" if folder else "data.parquet")
    made.save_to_disk(str(path)) if folder else made.to_parquet(str(path))
    table = read_table(path)
    assert table["label"].tolist() == ["joy", "anger", None, None]
    assert table["many"].tolist() == [["anger", "joy"], [], None, ["joy"]]
    assert table["inside"][1] == {"a": "joy", "n": 1}


@pytest.mark.parametrize(
    "metadata", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": 3}}}',
                 b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 1}}}}']
)  # fmt: skip
def test_metadata_of_another_shape_is_none(tmp_path: Path, metadata: bytes) -> None:
    made = pa.table({"label": [1, 0]}).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(made, tmp_path / "data.parquet")
    assert read_table(tmp_path / "data.parquet")["label"].tolist() == [1, 0]


def test_index_of_pandas_is_a_column(tmp_path: Path) -> None:
    pd.DataFrame({"id": ["x", "y"], "text": ["a", "b"]}).set_index("id").to_parquet(
        tmp_path / "data.parquet"
    )
    assert read_table(tmp_path / "data.parquet")["id"].tolist() == ["x", "y"]
