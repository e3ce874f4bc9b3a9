"""Rows of several adapters. Run: python -m pytest tests/sweeps/test_rows.py"""

import numpy as np
import pandas as pd
import pytest

from lora_fsdp.data.rows import TaskData
from lora_fsdp.errors import SplitError
from lora_fsdp.sweeps.rows import fold_numbers, rows_of_run
from tests.support.tiny import ToyTask, toy_table


def data_of(table):
    task = ToyTask().bind(table)
    examples = task.examples(table)
    return TaskData(task, examples[: len(examples) - 9], examples[-9:], 0)


def test_every_row_is_held_out_once_and_learnt_from_by_the_others():
    data = data_of(toy_table(60))
    rows = rows_of_run(data, folds=5, chooses=False, eval_size=0.1, seed=0)
    everything = {example.row for example in [*data.train, *data.held_out]}
    held_out = [example.row for fold in rows.held_out for example in fold]
    assert sorted(held_out) == sorted(everything)
    for train, other in zip(rows.train, rows.held_out, strict=True):
        assert {one.row for one in train} == everything - {one.row for one in other}
        assert 10 <= len(other) <= 14
        labels = [one.target for one in other]
        assert all(3 <= labels.count(label) <= 5 for label in set(labels))


def test_rows_with_one_text_stay_together_and_rare_labels_are_no_obstacle():
    table = toy_table(40)
    table.loc[1:20, "text"] = [f"twin {number // 2}" for number in range(20)]
    table["label"] = ["negative", *["positive"] * 39]
    data = data_of(table)
    everything = [*data.train, *data.held_out]
    numbers = fold_numbers(data.task, everything, folds=4, seed=1)
    twins = pd.Series(numbers).groupby([one.prompt.content for one in everything]).nunique()
    assert (twins == 1).all()
    assert set(numbers) == {0, 1, 2, 3}
    again = fold_numbers(data.task, everything, folds=4, seed=1)
    assert np.array_equal(numbers, again)


def test_more_folds_than_texts_are_refused():
    table = toy_table(12)
    table["text"] = ["a", "b", "c"] * 4
    data = data_of(table)
    with pytest.raises(SplitError, match="--folds 4 needs as many different texts"):
        rows_of_run(data, folds=4, chooses=False, eval_size=0.1, seed=0)


def test_a_choice_has_validation_rows_of_its_own():
    data = data_of(toy_table(60))
    rows = rows_of_run(data, folds=None, chooses=True, eval_size=10, seed=0)
    parts = [rows.train[0], rows.held_out[0], rows.test]
    assert [len(part) for part in parts] == [41, 10, 9]
    assert len({one.row for part in parts for one in part}) == 60
    assert rows.test == data.held_out


def test_without_a_choice_the_division_is_the_runs():
    data = data_of(toy_table(60))
    rows = rows_of_run(data, folds=None, chooses=False, eval_size=10, seed=0)
    assert rows.of(None) == (data.train, data.held_out)
    assert rows.test == []
