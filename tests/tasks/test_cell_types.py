"""Labels and texts of every type that a cell may have: used as they are, or the row is named.

Run: python -m pytest tests/tasks/test_cell_types.py
"""

from __future__ import annotations

import datetime as dt
import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_fsdp import ClassificationTask
from lora_fsdp.data.splits import split_table
from lora_fsdp.data.tables import read_table
from lora_fsdp.errors import ArgumentError, MalformedRowError
from lora_fsdp.tasks import Task, get_task

NO_LABELS = [
    ["a"],
    ["a", "b"],
    [],
    {"a": 1},
    {},
    np.array(["a", "b"]),
    np.array([1, 2]),
    ("a", "b"),
    b"\xff\xfe",
]
LABELS = [
    (b"joy", "joy"),
    (np.bytes_(b"joy"), "joy"),
    (np.str_("joy"), "joy"),
    (np.int8(3), "3"),
    (np.float16(0.1), "0.1"),
    (np.bool_(True), "True"),
    (decimal.Decimal("2.50"), "2.50"),
    (dt.date(2024, 1, 2), "2024-01-02"),
    (pd.Timestamp("2024-01-02"), "2024-01-02 00:00:00"),
    (10**20 + 1, "100000000000000000001"),
]


def table_of(label: object, *, other: object = "x") -> pd.DataFrame:
    cells = pd.Series([label, other, "y"], index=[1, 2, 3], dtype=object)
    return pd.DataFrame({"text": ["a", "b", "c"], "label": cells}, index=[1, 2, 3])


def classification(**options: Any) -> ClassificationTask:
    return ClassificationTask(text_column="text", label_column="label", **options)


@pytest.mark.parametrize("label", NO_LABELS, ids=repr)
@pytest.mark.parametrize("labels", [None, ["x", "y"]])
def test_what_is_no_label_is_named_and_can_be_left_out(label: object, labels: Any) -> None:
    table, task = table_of(label), classification(labels=labels)
    with pytest.raises(MalformedRowError, match=r"1 of 3 rows .*row 1 \(column 'label' holds"):
        task.bind(table)
    kept, dropped = task.drop_bad_rows(table)
    assert (kept.index.tolist(), dropped) == ([2, 3], 1)
    assert task.bind(kept).labels == ("x", "y")


@pytest.mark.parametrize(("label", "text"), LABELS, ids=[repr(label) for label, _ in LABELS])
def test_every_other_type_is_a_label(label: object, text: str) -> None:
    table = table_of(label, other=None)
    kept, _ = classification().drop_bad_rows(table)
    task = classification().bind(kept)
    assert task.examples(kept)[0].target == f" {text}"
    assert text in (task.labels or ())


def test_label_set_of_lists_is_refused() -> None:
    with pytest.raises(ArgumentError, match="a list, not one label"):
        classification(labels=[["a"], ["b"]])


def test_labels_of_any_type_can_be_split_by() -> None:
    cells = pd.Series([["a"], ["b"]] * 10, dtype=object)
    table = pd.DataFrame({"text": [[str(n)] for n in range(20)], "label": cells})
    train, test = split_table(table, text_column="text", label_column="label", test_size=4, seed=0)
    assert (len(train), sorted(map(str, test["label"]))) == (16, ["['a']"] * 2 + ["['b']"] * 2)


def test_texts_stored_as_bytes(tmp_path: Path) -> None:
    columns = {"text": [b"caf\xc3\xa9", b"b"], "label": [b"x", b"y"], "answer": [[b"p"], [b"q"]]}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    table = read_table(tmp_path / "data.parquet")
    (first, _) = classification().bind(table).examples(table)
    assert (first.prompt.text, first.target) == ("café", " x")
    assert get_task("generation").examples(table)[0].target == ' ["p"]'


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        (classification(), {"text": b"\xff", "label": "x"}, "text"),
        (
            get_task("inference"),
            {"premise": "a", "hypothesis": b"\xff", "label": "x"},
            "hypothesis",
        ),
        (get_task("generation"), {"text": "a", "answer": b"\xff"}, "answer"),
        (get_task("alpaca"), {"instruction": "a", "input": b"\xff", "output": "b"}, "input"),
        (
            get_task("question_answering"),
            {"context": b"\xff", "question": "q", "answer": "b"},
            "context",
        ),
        (
            get_task("multiple_choice"),
            {"question": b"\xff", "choices": ["a", "b"], "answer": "b"},
            "question",
        ),
    ],
)
def test_bytes_that_are_no_text(task: Task, row: dict[str, Any], column: str) -> None:
    table = pd.DataFrame([row], index=[7])
    with pytest.raises(MalformedRowError, match=rf"row 7 \(column '{column}' holds bytes that are"):
        task.bind(table)


def test_nested_cells_are_json_in_prompts_and_targets() -> None:
    table = pd.DataFrame({"text": [["a", None]], "answer": [{"b": [1, True]}]})
    (example,) = get_task("generation").bind(table).examples(table)
    assert example.prompt.text == '["a", null]'
    assert example.target == ' {"b": [1, true]}'
