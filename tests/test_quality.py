"""The table of how good adapters are: arms, seeds, and a call that goes on where one was cut short.

Run: python -m pytest tests/test_quality.py
"""

import json
import statistics

import pytest
import torch

from benchmarks.quality import ARMS, RIVALS, ROOT, Results, Seed, Setting, main, measure, table
from tests.support.adapters import save_base
from tests.support.tiny import LABELS, toy_table

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "quality.md"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    save_base(folder / "base")
    toy_table(60).rename(columns={"label": "sentiment"}).to_csv(folder / "rows.csv", index=False)
    return folder


def options(folder, output, *more):
    return [
        "--model", str(folder / "base"), "--table", str(folder / "rows.csv"), "--rows", "24",
        "--held_out", "18", "--max_steps", "2", "--output", str(output), *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_results_are_kept_as_each_arm_ends_and_not_found_again(toy, tmp_path, capsys):
    file = tmp_path / "found.json"
    arms = ["--arms", RIVALS, "default", "lora-plus", "few-shot", "rank-32-rslora"]
    assert main(options(toy, file, *arms, "--seeds", "1")) == 0
    first = json.loads(file.read_text())["results"]
    trained = [one["arm"] for one in first if one["steps"]]
    assert trained == ["default", "lora-plus", "few-shot", "rank-32-rslora"]
    assert {"majority", "TF-IDF + logistic", "frozen probe", "untrained, best way"} == {
        one["arm"] for one in first if not one["steps"]
    }
    capsys.readouterr()
    assert main(options(toy, file, *arms[:3], "--seeds", "2")) == 0
    second = json.loads(file.read_text())["results"]
    assert second[: len(first)] == first
    assert {one["seed"] for one in second[len(first) :]} == {1}
    printed = capsys.readouterr().out
    values = [one["macro_f1"] for one in second if one["arm"] == "default"]
    shown = f"| default | {statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f} |"
    assert shown in printed
    assert f"| {RIVALS} |" not in printed


def test_all_arms_of_a_seed_have_the_same_rows(toy):
    setting = Setting(str(toy / "base"), str(toy / "rows.csv"), "sentiment", 24, 18, "cpu")
    one, again, other = (Seed(setting, number).data for number in (0, 0, 1))
    assert [row.row for row in one.held_out] == [row.row for row in again.held_out]
    assert [row.row for row in one.held_out] != [row.row for row in other.held_out]
    assert (len(one.train), len(one.held_out)) == (24, 18)
    assert {row.target.strip() for row in one.train} == set(LABELS)


def test_nothing_is_started_that_would_end_too_late(toy, tmp_path):
    setting = Setting(str(toy / "base"), str(toy / "rows.csv"), "sentiment", 24, 18, "cpu", 1)
    results = Results(tmp_path / "found.json", setting)
    left = measure(setting, ["default"], [0], results, minutes=0.0)
    assert left == ["default of seed 0"]
    assert results.of_call() == []


def test_other_settings_are_other_results(toy, tmp_path):
    found = {"macro_f1": 0.5, "accuracy": 0.5, "seconds": 1.0, "steps": 1}
    settings = [
        Setting("a/base", "b/rows.csv", "sentiment", rows, 18, device)
        for rows, device in ((24, "cpu"), (25, "cpu"), (24, "cuda"))
    ]
    file = tmp_path / "found.json"
    for setting in settings:
        Results(file, setting).add("default", 0, found)
    assert [len(Results(file, one).of_call()) for one in settings] == [1, 1, 1]
    assert table(Results(file, settings[0]).of_call()).endswith(
        "| default | 0.500 | 0.500 | 1 | 1 |"
    )


@pytest.mark.parametrize("rows", [400, 800, 2000])
def test_the_page_shows_the_stored_results(rows):
    stored = json.loads((RESULTS / "quality-h200.json").read_text())["results"]
    assert table([one for one in stored if one["setting"]["rows"] == rows]) in PAGE.read_text()


def test_the_list_names_every_arm_and_a_missing_gpu_is_said(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ARMS)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["--device", "cuda"])
        assert "there is no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_an_arm_of_every_kind_runs(toy, tmp_path):
    """TRL's as well, whose import alone takes ten seconds."""
    pytest.importorskip("trl")
    file = tmp_path / "found.json"
    arms = ["batch-4", "class-weights", "smoothing", "focal", "trl-all-linear-2-epochs"]
    assert main(options(toy, file, "--seeds", "1", "--arms", *arms)) == 0
    found = {one["arm"] for one in json.loads(file.read_text())["results"]}
    assert set(arms) == found
