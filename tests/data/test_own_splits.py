"""The user's own splits, and a third one. Run: python -m pytest tests/data/test_own_splits.py"""

from __future__ import annotations

from pathlib import Path

import datasets
import pandas as pd
import pytest

from lora_fsdp import DataArguments
from lora_fsdp.arguments.training import chooses_checkpoint
from lora_fsdp.data.checking import check_task_data
from lora_fsdp.data.rows import TaskData, load_task_data
from lora_fsdp.errors import ArgumentError, ColumnNotFoundError, MalformedRowError, SplitError

LABELS = ("good", "bad")


def table_of(count: int, *, begin: int = 0) -> pd.DataFrame:
    numbers = range(begin, begin + count)
    return pd.DataFrame({"text": [f"text {n}" for n in numbers],
                         "label": [LABELS[n % 2] for n in numbers]})  # fmt: skip


def load(data_file: Path | str, *, choosing: bool = False, **options: object) -> TaskData:
    columns = {"text_column": "text", "label_column": "label"}
    arguments = DataArguments(task="classification", data_file=str(data_file), **columns, **options)
    return load_task_data(arguments, seed=0, choosing=choosing)


def sizes(data: TaskData) -> tuple[int, int, int]:
    return len(data.train), len(data.held_out), len(data.test)


def texts(examples: object) -> set[str]:
    return {example.prompt.text for example in examples}


def with_column(folder: Path, values: list[str], *, name: str = "split", **more: object) -> Path:
    file = folder / "rows.csv"
    table_of(len(values)).assign(**{name: values}, **more).to_csv(file, index=False)
    return file


class TestColumn:
    @pytest.mark.parametrize(
        ("names", "found"),
        [
            (["train", "validation", "test"], (10, 10, 10)),
            (["Train ", "DEV", "testing"], (10, 10, 10)),
            (["training", "val", "eval"], (10, 10, 10)),
            (["train", "valid", "train"], (20, 10, 0)),
            # Nothing is chosen, so one set of held-out rows is enough.
            (["train", "test", "test"], (10, 20, 0)),
        ],
    )
    def test_is_found_and_said(self, tmp_path, names, found) -> None:
        data = load(with_column(tmp_path, names * 10, name="part"))
        assert sizes(data) == found
        assert any("column 'part' divides the rows" in line for line in data.splits)
        assert data.held_out[0].row == 2

    def test_test_rows_choose_nothing(self, tmp_path) -> None:
        data = load(with_column(tmp_path, ["train", "train", "test"] * 10), choosing=True,
                    eval_size=4)  # fmt: skip
        assert sizes(data) == (16, 4, 10)

    @pytest.mark.parametrize(
        "values",
        [
            ["train", "bus", "plane"] * 4,  # means of transport
            ["train", "train", "train"] * 4,
            ["test", "validation", "test"] * 4,
        ],
    )
    def test_what_is_no_split_is_left_alone(self, tmp_path, values) -> None:
        data = load(with_column(tmp_path, values, name="vehicle"), eval_size=3)
        assert sizes(data) == (9, 3, 0)

    def test_the_label_is_no_split(self, tmp_path) -> None:
        file = tmp_path / "rows.csv"
        table_of(20).assign(label=["train", "test"] * 10).to_csv(file, index=False)
        assert sizes(load(file, eval_size=4)) == (16, 4, 0)

    def test_none_and_another(self, tmp_path) -> None:
        file = with_column(tmp_path, ["train", "test"] * 10, fold=["test", "train"] * 10)
        assert sizes(load(file, split_column="none", eval_size=4)) == (16, 4, 0)
        assert load(file, split_column="fold").train[0].row == 2

    def test_mistakes(self, tmp_path) -> None:
        file = with_column(tmp_path, ["train", "test", "rest"] * 4)
        with pytest.raises(SplitError, match=r"Row 3: column 'split' holds 'rest'"):
            load(file, split_column="split")
        with pytest.raises(ColumnNotFoundError, match="'fold' for --split_column"):
            load(file, split_column="fold")
        with pytest.raises(SplitError, match="of no row that it is to train on"):
            load(with_column(tmp_path, ["test"] * 4), split_column="split")
        sorted_file = with_column(tmp_path, ["train"] * 9 + ["test"] * 3)
        with pytest.raises(SplitError, match="None of the 9 rows that are used is of the split"):
            load(sorted_file, head=9)
        held_out = tmp_path / "held_out.csv"
        table_of(4, begin=100).to_csv(held_out, index=False)
        with pytest.raises(SplitError, match="leave out --test_file"):
            load(sorted_file, test_file=str(held_out))
        assert sizes(load(sorted_file, eval_file=str(held_out))) == (9, 4, 3)


class TestFolders:
    def test_saved_dataset_dict(self, tmp_path) -> None:
        splits = {"train": 12, "validation": 6, "test": 8, "unsupervised": 5}
        datasets.DatasetDict(
            {
                name: datasets.Dataset.from_pandas(table_of(rows, begin=100 * place))
                for place, (name, rows) in enumerate(splits.items())
            }
        ).save_to_disk(tmp_path / "saved")
        data = load(tmp_path / "saved")
        assert sizes(data) == (12, 6, 8)
        assert "text 200" in texts(data.test)
        assert "test rows are those of the folder" in " ".join(data.splits)

    @pytest.mark.parametrize(
        "names",
        [
            {"train": "train.csv", "test": "test.csv"},
            {"train": "data/train.jsonl", "test": "data/eval.jsonl"},
            {"train": "train/one.csv", "test": "test/one.csv"},
            {"train": "data/train-00000-of-00001.parquet",
             "test": "data/test-00000-of-00001.parquet"},
        ],
    )  # fmt: skip
    def test_layouts_of_the_hub(self, tmp_path, names) -> None:
        for place, name in enumerate(names.values()):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            write(table_of(12 - place, begin=100 * place), tmp_path / name)
        (tmp_path / "README.md").write_text("# A dataset")
        data = load(tmp_path)
        assert sizes(data) == (12, 11, 0)
        assert texts(data.held_out) == {f"text {number}" for number in range(100, 111)}

    def test_several_files_of_a_split(self, tmp_path) -> None:
        for place in range(3):
            write(table_of(5, begin=10 * place), tmp_path / f"train-0000{place}-of-00003.csv")
        data = load(tmp_path, eval_size=3)
        assert sizes(data) == (12, 3, 0)
        assert {one.row for one in [*data.train, *data.held_out]} == set(range(1, 16))
        write(table_of(5).assign(more=1), tmp_path / "train-00001-of-00003.csv")
        with pytest.raises(MalformedRowError, match="read as one table need the same"):
            load(tmp_path)

    def test_another_file_wins(self, tmp_path) -> None:
        write(table_of(12), tmp_path / "train.csv")
        write(table_of(5, begin=50), tmp_path / "test.csv")
        write(table_of(7, begin=70), tmp_path / "mine.csv")
        data = load(tmp_path, test_file=str(tmp_path / "mine.csv"))
        assert texts(data.held_out) == {f"text {number}" for number in range(70, 77)}
        assert "are not used" in " ".join(data.splits)


def write(table: pd.DataFrame, file: Path) -> None:
    if file.suffix == ".parquet":
        table.to_parquet(file)
    elif file.suffix == ".jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        table.to_csv(file, index=False)


class TestThirdSplit:
    def test_half_of_what_is_held_out_where_something_is_chosen(self, tmp_path) -> None:
        file = tmp_path / "rows.csv"
        table_of(400).to_csv(file, index=False)
        plain, chosen = load(file, eval_size=100), load(file, eval_size=100, choosing=True)
        assert sizes(plain) == (300, 100, 0)
        assert sizes(chosen) == (300, 50, 50)
        # The rows that are trained on, and their order, stay what they were.
        assert [one.row for one in plain.train] == [one.row for one in chosen.train]
        assert texts(chosen.held_out) | texts(chosen.test) == texts(plain.held_out)
        assert plain.reported == plain.held_out
        assert chosen.reported == chosen.test
        assert sizes(load(file, eval_size=100, choosing=True, test_size=0)) == (300, 100, 0)
        # Halves of these give no verdict.
        assert sizes(load(file, eval_size=50, choosing=True)) == (350, 50, 0)

    def test_what_chooses(self) -> None:
        """Plan and doctor ask before the arguments have settled what early stopping needs."""
        assert not chooses_checkpoint({"load_best_model_at_end": False})
        assert chooses_checkpoint({"load_best_model_at_end": True})
        assert chooses_checkpoint({"early_stopping_patience": 3})
        assert not chooses_checkpoint({"early_stopping_patience": None})

    def test_a_size_of_its_own(self, tmp_path) -> None:
        file = tmp_path / "rows.csv"
        table_of(400).to_csv(file, index=False)
        data = load(file, eval_size=0.1, test_size=0.25)
        assert sizes(data) == (260, 40, 100)
        assert not texts(data.train) & texts(data.test)
        assert not texts(data.held_out) & texts(data.test)
        with pytest.raises(SplitError, match="asks for 400 test rows"):
            load(file, test_size=400)
        with pytest.raises(ArgumentError, match="test_size=-1"):
            load(file, test_size=-1)

    def test_own_rows_are_never_divided(self, tmp_path) -> None:
        train, held_out, test = (tmp_path / name for name in ("a.csv", "b.csv", "c.csv"))
        table_of(40).to_csv(train, index=False)
        table_of(80, begin=100).to_csv(held_out, index=False)
        table_of(70, begin=200).to_csv(test, index=False)
        named = {"eval_file": str(held_out)}
        assert sizes(load(train, choosing=True, **named)) == (40, 80, 0)
        assert sizes(load(train, choosing=True, test_size=10, **named)) == (30, 80, 10)
        named["test_file"] = str(test)
        assert sizes(load(train, choosing=True, **named)) == (40, 80, 70)
        with pytest.raises(ArgumentError, match="test rows are named already"):
            load(train, test_size=10, **named)


def test_rows_that_are_scored_and_trained_on_are_said(tmp_path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    table_of(20).to_csv(train, index=False)
    table_of(10, begin=15).to_csv(test, index=False)
    [warning] = [
        line
        for line in check_task_data(load(train, test_file=str(test)), None).warnings
        if "trained on" in line
    ]
    assert warning.startswith("5 of 10 held-out rows are trained on as well")
    assert "the first is row 1: 'text 15'" in warning
    found = check_task_data(load(train, eval_size=4), None)
    assert "held-out-trained-on" not in found.concerns
