"""Labels by other names, and several as one. Run: python -m pytest tests/tasks/test_renaming.py"""

import pandas as pd
import pytest

from lora_fsdp import get_task
from lora_fsdp.arguments import DataArguments
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.errors import ArgumentError, LoraFsdpError, UnknownLabelError
from lora_fsdp.tasks.renaming import new_names


@pytest.fixture
def file(tmp_path):
    rows = [f"text {n} here,{n % 4}" for n in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return str(tmp_path / "t.csv")


def loaded(file, **options):
    return load_task_data(DataArguments(task="classification", data_file=file, **options), seed=0)


def test_labels_are_learnt_under_their_new_names(file):
    data = loaded(file, rename_labels=["0=bad", "1=good"], merge_labels=["rest=2,3"])
    assert data.task.labels == ("bad", "good", "rest")
    assert {one.target for one in [*data.train, *data.held_out]} == {" bad", " good", " rest"}


def test_merged_under_the_new_names(file):
    data = loaded(file, rename_labels=["0=bad"], merge_labels=["rest=bad,3"])
    assert data.task.labels == ("1", "2", "rest")


def test_an_adapter_knows_them(file):
    task = loaded(file, rename_labels=["0=bad"], merge_labels=["rest=2,3"]).task
    again = get_task("classification", task.options())
    old = pd.DataFrame({"text": ["a", "b"], "label": ["0", "3"]}, index=[1, 2])
    bound = again.bind(old, for_training=False)
    assert [example.target for example in bound.examples(old)] == [" bad", " rest"]
    new = pd.DataFrame({"text": ["a"], "label": ["bad"]}, index=[1])
    assert again.bind(new, for_training=False).labels == ("1", "bad", "rest")


def test_labels_that_are_named_are_the_new_ones(file):
    options = {"rename_labels": ["0=bad"], "merge_labels": ["rest=1,2,3"]}
    assert loaded(file, labels=["rest", "bad"], **options).task.labels == ("rest", "bad")
    with pytest.raises(UnknownLabelError, match="label 'rest'"):
        loaded(file, labels=["0", "bad"], **options)


@pytest.mark.parametrize(
    ("names", "merges", "said"),
    [
        (["0"], [], "--rename_labels 0: write each as old=new"),
        (["=a"], [], "write each as old=new"),
        ([], ["a"], "--merge_labels a: write each as new=old,old"),
        (["0=a", "0=b"], [], "names the label '0' twice"),
        (["0=a", "1=a"], [], "take --merge_labels a="),
        ([], ["a=0,1", "b=1"], "has the label '1' twice"),
    ],
)
def test_one_sentence(names, merges, said):
    with pytest.raises(ArgumentError, match=said):
        new_names(names, merges)


def test_a_label_that_no_row_has(file):
    with pytest.raises(ArgumentError, match=r"No row has the label '4'.*has '0', '1', '2', '3'"):
        loaded(file, rename_labels=["4=bad"])


def test_tasks_without_such_labels_refuse_them(file):
    for task in ("generation", "multiple_choice", "chat"):
        with pytest.raises(LoraFsdpError, match="label_names"):
            load_task_data(DataArguments(task=task, data_file=file, rename_labels=["0=a"]), seed=0)
