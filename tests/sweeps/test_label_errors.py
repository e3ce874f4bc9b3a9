"""Rows that may be labelled wrongly. Run: python -m pytest tests/sweeps/test_label_errors.py"""

import numpy as np
import pandas as pd
import pytest

from lora_fsdp.sweeps.outcome.label_errors import label_errors, write_label_errors
from lora_fsdp.tasks import (
    ClassificationTask,
    GenerationTask,
    MultilabelTask,
    QuestionsTask,
    RatingTask,
    SoftClassificationTask,
)
from tests.support.sweeps import prepared, toy_sweep
from tests.support.tiny import LABELS

SET = ["01", "NA"]
TASK = ClassificationTask(instruction="Say it:", text_column="text", labels=SET)
KIND = TASK.answer_kind


def pooled(given, first):
    """Rows of two labels, of which the first has these probabilities."""
    return pd.DataFrame(
        {
            "row": range(11, 11 + len(given)),
            "text": [f"text {number}\x1b\r\n" for number in range(len(given))],
            "target": given,
            "probability/01": first,
            "probability/NA": 1 - np.array(first),
            "fold": [1 + number % 2 for number in range(len(given))],
        }
    )


def by_hand(table, labels):
    """Confident learning row by row: (row, suggested) of each row suspected."""
    thresholds = {
        label: table.loc[table["target"] == label, f"probability/{label}"].mean()
        for label in labels
    }
    found = []
    for _, line in table.iterrows():
        sure = {
            label: line[f"probability/{label}"]
            for label in labels
            if line[f"probability/{label}"] >= thresholds[label]
        }
        best = max(sure, key=sure.get, default=None)
        if best is not None and sure[best] > line[f"probability/{line['target']}"]:
            found.append((line["row"], best))
    return found


def test_the_wrong_label_is_found_by_its_row_number(tmp_path):
    table = pooled(["01"] * 4 + ["NA"] * 5, [0.9, 0.9, 0.8, 0.95, 0.1, 0.2, 0.97, 0.15, 0.85])
    found = label_errors(table, KIND)
    assert found["row"].tolist() == [17]
    assert found.loc[0, ["given_label", "suggested_label"]].tolist() == ["NA", "01"]
    assert found.loc[0, "probability"] == pytest.approx(0.97)
    assert "1 of 9 rows" in write_label_errors(table, TASK, tmp_path)
    written = pd.read_csv(tmp_path / "label_errors.csv", dtype=str, keep_default_na=False)
    assert written.loc[0, "given_label"] == "NA"
    assert "text 6\x1b" in written.loc[0, "text"]


def test_all_are_right(tmp_path):
    table = pooled(["01", "NA"], [0.9, 0.1])
    assert "0 of 2 rows" in write_label_errors(table, TASK, tmp_path)
    assert pd.read_csv(tmp_path / "label_errors.csv").empty
    assert write_label_errors(None, TASK, tmp_path) is None


@pytest.mark.parametrize("seed", range(5))
def test_as_counted_row_by_row(seed):
    generator = np.random.default_rng(seed)
    table = pooled(generator.choice(SET, 60).tolist(), generator.random(60))
    found = label_errors(table, KIND)
    assert sorted(zip(found["row"], found["suggested_label"], strict=True)) == by_hand(table, SET)
    lead = found["probability"] - found["probability_of_given"]
    assert (lead.diff().dropna() <= 0).all()


@pytest.mark.slow
def test_a_run_of_folds_writes_them_of_all_rows(tmp_path, capsys):
    toy_sweep(tmp_path, folds=3)
    said = " ".join(capsys.readouterr().out.split())
    assert "of 60 rows may be labelled wrongly" in said
    everything = pd.read_csv(tmp_path / "run" / "out_of_fold.csv")
    found = pd.read_csv(tmp_path / "run" / "label_errors.csv")
    expected = by_hand(everything, LABELS)
    assert sorted(zip(found["row"], found["suggested_label"], strict=True)) == expected
    assert len(expected) > 0


def test_of_several_labels_each_is_looked_at_by_itself():
    """As many runs of confident learning as there are labels, each on yes and no."""
    generator = np.random.default_rng(0)
    topics, rows = ["bag", "crew"], 50
    given = generator.random((rows, 2)) < 0.4
    applying = np.clip(given * 0.3 + generator.random((rows, 2)) * 0.7, 0, 1)
    table = pd.DataFrame(
        {
            "row": range(1, rows + 1),
            "text": "a text",
            "target": ["; ".join(np.array(topics)[row]) or "none" for row in given],
            "yes/bag": applying[:, 0],
            "yes/crew": applying[:, 1],
            "fold": 1,
        }
    )
    found = label_errors(table, MultilabelTask(labels=topics).answer_kind)
    expected = []
    for place, topic in enumerate(topics):
        alone = table.assign(target=np.where(given[:, place], "yes", "no"))
        alone["probability/yes"], alone["probability/no"] = (
            applying[:, place],
            1 - applying[:, place],
        )
        expected += [(row, topic, suggested) for row, suggested in by_hand(alone, ["yes", "no"])]
    assert len(expected) > 3
    named = zip(found["row"], found["question"], found["suggested_label"], strict=True)
    assert sorted(named) == sorted(expected)
    lead = found["probability"] - found["probability_of_given"]
    assert (lead.diff().dropna() <= 0).all()


def test_scores_are_looked_at_as_levels():
    task = RatingTask(labels=["1", "2", "3"])
    table = pd.DataFrame(
        {
            "row": range(1, 7),
            "text": "a text",
            "target": ["1", "1", "2", "2", "3", "3"],
            "probability/1": [0.9, 0.05, 0.1, 0.1, 0.0, 0.1],
            "probability/2": [0.1, 0.05, 0.8, 0.7, 0.1, 0.1],
            "probability/3": [0.0, 0.9, 0.1, 0.2, 0.9, 0.8],
            "fold": 1,
        }
    )
    found = label_errors(table, task.answer_kind)
    assert found[["row", "given_label", "suggested_label"]].to_numpy().tolist() == [[2, "1", "3"]]
    assert "question" not in found


def test_what_has_no_one_right_answer_of_a_set_is_said(tmp_path):
    table = pd.DataFrame({"row": [1], "text": ["a"], "target": ["a"], "fold": [1]})
    for task in (GenerationTask(), SoftClassificationTask(labels=["a", "b"])):
        line = write_label_errors(table, task, tmp_path)
        assert line.startswith("No label_errors.csv: ")
        assert task.answer_kind.description in line
    assert not list(tmp_path.iterdir())


def test_questions_of_a_run_of_folds(tmp_path, capsys):
    """Rows that answer one question only, and one whose answer is plainly another's."""
    rows = 40
    table = pd.DataFrame(
        {
            "text": [f"{'late bad' if n % 2 else 'good friendly'} flight {n}" for n in range(rows)],
            "late": ["" if n % 5 == 0 else ("yes", "no")[1 - n % 2] for n in range(rows)],
            "stars": [("5", "1")[n % 2] for n in range(rows)],
        }
    )
    table.to_csv(prepared(tmp_path)[1], index=False)
    questions = [
        {"column": "late", "ask": "Was it late?", "labels": ["yes", "no"]},
        {"column": "stars", "ask": "How many stars?", "scores": [1, 5]},
    ]
    data = {
        "task": "questions", "labels": None, "label_column": None,
        "task_options": {"questions": questions},
    }  # fmt: skip
    toy_sweep(tmp_path, data=data, folds=2, lora_r=4, num_train_epochs=2)
    said = " ".join(capsys.readouterr().out.split())
    assert f"of {rows} rows may be labelled wrongly" in said
    pooled = pd.read_csv(tmp_path / "run" / "out_of_fold.csv")
    found = pd.read_csv(tmp_path / "run" / "label_errors.csv", dtype={"given_label": str})
    kind = QuestionsTask(questions=questions).answer_kind
    late, stars = kind.labelled(pooled)
    assert sum(one is None for one in late.given) == 8
    assert set(stars.given) == {"1", "5"}
    np.testing.assert_allclose(late.probabilities.sum(axis=1), 1, atol=1e-5)
    asked = {(one.row, one.question) for one in found.itertuples()}
    unanswered = {int(row) for row, one in zip(pooled["row"], late.given, strict=True) if not one}
    assert not asked & {(row, "late") for row in unanswered}
