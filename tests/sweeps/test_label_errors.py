"""Rows that may be labelled wrongly. Run: python -m pytest tests/sweeps/test_label_errors.py"""

import numpy as np
import pandas as pd
import pytest

from lora_fsdp.sweeps.outcome.label_errors import label_errors, write_label_errors
from tests.support.sweeps import toy_sweep
from tests.support.tiny import LABELS

SET = ["01", "NA"]


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
    found = label_errors(table, SET)
    assert found["row"].tolist() == [17]
    assert found.loc[0, ["given_label", "suggested_label"]].tolist() == ["NA", "01"]
    assert found.loc[0, "probability"] == pytest.approx(0.97)
    assert "1 of 9 rows" in write_label_errors(table, SET, tmp_path)
    written = pd.read_csv(tmp_path / "label_errors.csv", dtype=str, keep_default_na=False)
    assert written.loc[0, "given_label"] == "NA"
    assert "text 6\x1b" in written.loc[0, "text"]


def test_all_are_right(tmp_path):
    table = pooled(["01", "NA"], [0.9, 0.1])
    assert "0 of 2 rows" in write_label_errors(table, SET, tmp_path)
    assert pd.read_csv(tmp_path / "label_errors.csv").empty
    assert write_label_errors(table, (), tmp_path) is None
    assert write_label_errors(None, SET, tmp_path) is None


@pytest.mark.parametrize("seed", range(5))
def test_as_counted_row_by_row(seed):
    generator = np.random.default_rng(seed)
    table = pooled(generator.choice(SET, 60).tolist(), generator.random(60))
    found = label_errors(table, SET)
    assert sorted(zip(found["row"], found["suggested_label"], strict=True)) == by_hand(table, SET)
    lead = found["probability"] - found["probability_of_given"]
    assert (lead.diff().dropna() <= 0).all()


def test_a_run_of_folds_writes_them_of_all_rows(tmp_path, capsys):
    toy_sweep(tmp_path, folds=3)
    said = " ".join(capsys.readouterr().out.split())
    assert "of 60 rows may be labelled wrongly" in said
    everything = pd.read_csv(tmp_path / "run" / "out_of_fold.csv")
    found = pd.read_csv(tmp_path / "run" / "label_errors.csv")
    expected = by_hand(everything, LABELS)
    assert sorted(zip(found["row"], found["suggested_label"], strict=True)) == expected
    assert len(expected) > 0
