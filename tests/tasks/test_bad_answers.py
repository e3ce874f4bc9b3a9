"""Rows that no kind of answer can take: one sentence each, with the row and the column.

Run: python -m pytest tests/tasks/test_bad_answers.py
"""

import pandas as pd
import pytest

from lora_fsdp import DataArguments
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.errors import DataError

TEXTS = [f"text {number}" for number in range(8)]
LABELLED = {"task": "classification", "label_column": "label", "instruction": "Say it:"}
RATED = {"task": "rating", "label_column": "rating"}
SHARED = {"task": "soft_classification", "task_options": {"share_columns": ["a", "b"]}}
VOTED = {
    "task": "soft_classification",
    "task_options": {"share_columns": ["a", "b"], "votes": True},
}
SEVERAL = {"task": "multilabel", "label_column": "labels"}
NUMBERS = {"task": "regression", "label_column": "value"}
WRITTEN = {"task": "generation", "label_column": "answer", "instruction": "Do it:"}


def asked(question):
    return {"task": "questions", "task_options": {"questions": [question]}}


LATE = asked({"column": "late", "labels": ["yes", "no"]})
STARS = asked({"column": "stars", "scores": [1, 2]})


def read(tmp_path, columns, options):
    file = tmp_path / "rows.csv"
    pd.DataFrame({"text": TEXTS, **columns}).to_csv(file, index=False)
    arguments = {"text_column": "text", "eval_size": 2, **options}
    return load_task_data(DataArguments(data_file=str(file), **arguments), seed=0)


@pytest.mark.parametrize(
    ("options", "columns", "rest", "bad"),
    [
        *((RATED, "rating", ["1", "3"], bad) for bad in ("two", "", "nan", "inf", "2,5", "True")),
        *((SHARED, "a", ["0.5", "0.5"], bad) for bad in ("0.9", "-0.5", "x", "", "nan", "2")),
        *((VOTED, "a", ["1", "2"], bad) for bad in ("-1", "x", "inf")),
        *((LATE, "late", ["yes", "no"], bad) for bad in ("maybe", "")),
        *((STARS, "stars", ["1", "2"], bad) for bad in ("x", "3", "nan")),
        *((SEVERAL, "labels", ["a", "b"], bad) for bad in ("", "a;a")),
        *((NUMBERS, "value", ["1", "2"], bad) for bad in ("x", "", "inf", "nan")),
        *((WRITTEN, "answer", ["yes", "no"], bad) for bad in ("", "  ")),
        *((LABELLED, "label", ["a", "b"], bad) for bad in ("", " ")),
    ],
)
def test_a_bad_cell_is_named_with_row_and_column(options, columns, rest, bad, tmp_path):
    cells = [*(rest * 4)[:4], bad, *(rest * 4)[:3]]
    table = {columns: cells} | ({"b": ["0.5"] * 8} if columns == "a" else {})
    with pytest.raises(DataError, match="1 of 8 rows") as found:
        read(tmp_path, table, options)
    said = str(found.value)
    assert "row 5 (" in said
    assert f"'{columns}'" in said
    assert "\n" not in said
    whole = {name: [*some[:4], rest[0], *some[5:]] for name, some in table.items()}
    assert len(read(tmp_path, whole, options).train) == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight_column": "w"}, r"all 6 training rows are 0: see --weight_column w\."),
        ({"class_weights": ["a=0", "b=0"]}, r"all 6 training rows are 0: see --class_weights\."),
    ],
)
def test_weights_that_sum_to_zero(options, says, tmp_path):
    columns = {"label": ["a", "b"] * 4, "w": ["0"] * 8}
    with pytest.raises(DataError, match=says):
        read(tmp_path, columns, {**LABELLED, **options})


@pytest.mark.parametrize("bad", ["-1", "x", "nan", "inf", ""])
def test_a_weight_that_is_none(bad, tmp_path):
    columns = {"label": ["a", "b"] * 4, "w": ["1", "1", bad, *["1"] * 5]}
    with pytest.raises(DataError, match=r"1 of 8 rows have no weight: row 3 \(.*column 'w'"):
        read(tmp_path, columns, {**LABELLED, "weight_column": "w"})
