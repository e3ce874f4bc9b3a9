"""Columns and tasks that a table makes plain. Run: python -m pytest tests/tasks/test_guessing.py"""

import logging

import pandas as pd
import pytest

from lora_fsdp import get_task
from lora_fsdp.arguments import DataArguments
from lora_fsdp.cli.main import main
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.errors import ArgumentError, ColumnNotFoundError, IncompleteTaskError
from lora_fsdp.tasks.guessing import guess_label_column, guess_task, guess_text_column

SENTENCES = [f"the flight number {n} was late again" for n in range(12)]
FEW = ["late", "lost", "food"] * 4
IDS = [f"T-{n}" for n in range(12)]
NUMBERS = [n / 7 for n in range(12)]


def table(**columns):
    return pd.DataFrame(columns, index=pd.RangeIndex(1, 13, name="row"))


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        ({"tweet": SENTENCES, "sentiment": FEW}, "tweet", "sentiment"),
        ({"id": IDS, "Review Text": SENTENCES, "Category": FEW}, "Review Text", "Category"),
        ({"customerMessages": SENTENCES, "team": FEW}, "customerMessages", "team"),
        ({"text": SENTENCES, "title": SENTENCES, "label": FEW}, "text", "label"),
        ({"text": SENTENCES, "label": FEW, "category": FEW}, "text", "label"),
        ({"was_gesagt": SENTENCES, "art": FEW, "nr": IDS}, "was_gesagt", "art"),
        ({"body": SENTENCES, "stars": [1, 2, 3, 4, 5, 1] * 2}, "body", "stars"),
        ({"body": SENTENCES, "topic": FEW, "split": ["train", "test"] * 6}, "body", "topic"),
        ({"body": SENTENCES, "answer": FEW, "split": ["train", "test"] * 6}, "body", "answer"),
        ({"body": SENTENCES, "intent": FEW, "price": NUMBERS}, "body", "intent"),
        # Two that fit, or none.
        ({"title": SENTENCES, "body": SENTENCES, "review": SENTENCES}, None, None),
        ({"body": SENTENCES, "topic": FEW, "category": FEW}, "body", None),
        ({"a": SENTENCES, "b": SENTENCES, "c": FEW, "d": FEW}, None, None),
        ({"text": NUMBERS, "label": IDS}, None, None),
        ({"price": NUMBERS, "id": IDS}, None, None),
        ({"body": SENTENCES, "category": SENTENCES}, "body", None),
        ({"body": SENTENCES, "category": [["a"]] * 12}, "body", None),
    ],
)
def test_columns(columns, text, label):
    rows = table(**columns)
    assert guess_text_column(rows).column == text
    assert guess_label_column(rows, besides=[text]).column == label


def test_a_task_takes_them_and_says_so():
    task = get_task("classification").bind(table(tweet=SENTENCES, mood=FEW))
    assert (task.text_column, task.label_column) == ("tweet", "mood")
    assert task.guessed.startswith(
        "text is 'tweet' (by its name) and label is 'mood' (by its name)"
    )
    assert task.options()["text_column"] == "tweet"


@pytest.mark.parametrize("name", ["sentiment", "topic", "intent"])
def test_presets_whose_layouts_do_not_fit(name):
    assert get_task(name).bind(table(remark=SENTENCES, kind=FEW)).text_column == "remark"


def test_what_is_named_is_not_guessed():
    rows = table(tweet=SENTENCES, sentiment=FEW, mood=FEW)
    task = get_task("classification", {"label_column": "mood"}).bind(rows)
    assert (task.text_column, task.label_column) == ("tweet", "mood")
    assert "label" not in task.guessed.partition(";")[0]
    with pytest.raises(ColumnNotFoundError, match="Did you mean 'tweet' for 'twet'"):
        get_task("classification", {"text_column": "twet", "label_column": "mood"}).bind(rows)


def test_a_layout_comes_first():
    rows = table(content=SENTENCES, sentiment=FEW, text=IDS)
    task = get_task("sentiment").bind(rows)
    assert (task.text_column, task.guessed) == ("content", "")


def test_two_that_fit_are_named():
    rows = table(body=SENTENCES, topic=FEW, category=FEW)
    with pytest.raises(IncompleteTaskError, match="For the label: it may be 'topic' or 'category'"):
        get_task("classification").bind(rows)


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        (["messages"], "chat"),
        (["conversations", "system"], "chat"),
        (["instruction", "input", "output"], "alpaca"),
        (["context", "question", "answers", "id"], "question_answering"),
        (["premise", "hypothesis", "label"], "inference"),
    ],
)
def test_tasks_by_their_columns(columns, task):
    assert guess_task(table(**dict.fromkeys(columns, SENTENCES))) == task


class TestCommand:
    def written(self, tmp_path, **columns):
        table(**columns).to_csv(tmp_path / "t.csv", index=False)
        return str(tmp_path / "t.csv")

    def test_a_table_alone(self, tmp_path, capsys):
        file = self.written(tmp_path, nr=IDS, complaint=SENTENCES, kind=FEW)
        assert main(["tasks", "check", file, "--rows", "1"]) == 0
        printed = capsys.readouterr().out
        assert "columns: text is 'complaint' (by its name) and label is 'kind' (the only" in printed
        assert "task classification" in printed

    def test_it_is_said_before_a_model_is_read(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        file = self.written(tmp_path, complaint=SENTENCES, kind=FEW)
        data = load_task_data(DataArguments(data_file=file), seed=0)
        assert data.task.name == "classification"
        assert "Task: classification, by the columns of" in caplog.text
        assert "Columns: text is 'complaint' (by its name)" in caplog.text

    def test_a_named_column_helps(self, tmp_path):
        file = self.written(tmp_path, a=SENTENCES, b=SENTENCES, c=FEW, d=FEW)
        arguments = DataArguments(data_file=file, text_column="b", label_column="c")
        assert load_task_data(arguments, seed=0).task.options()["label_column"] == "c"

    def test_a_table_that_says_nothing(self, tmp_path):
        file = self.written(tmp_path, a=NUMBERS, b=NUMBERS)
        with pytest.raises(ArgumentError, match=r"\('a', 'b'\) do not say which: set --task"):
            load_task_data(DataArguments(data_file=file), seed=0)
