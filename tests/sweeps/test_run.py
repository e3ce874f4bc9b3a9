"""Several adapters through the front door. Run: python -m pytest tests/sweeps/test_run.py"""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora_fsdp.sweeps.run as sweep_run
from lora_fsdp.cli.main import main
from lora_fsdp.errors import ArgumentError, OutputFolderError, ResumeMismatchError
from lora_fsdp.evaluation.prediction import Predictor
from tests.support.ranks import launch_environment, run_ranks
from tests.support.sweeps import prepared, toy_sweep


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def seeds(place):
    return toy_sweep(place, "seeds", seeds=3)


@pytest.fixture(scope="module")
def folds(place):
    return toy_sweep(place, "folds", folds=3)


def test_seeds_give_an_adapter_each_and_one_figure(seeds, place, capsys):
    root = place / "seeds"
    assert seeds.comparison is None
    assert seeds.output_dir == root
    assert [one.name for one in seeds.summary.members] == ["seed-3", "seed-4", "seed-5"]
    adapters = [adapter_of(root / one.name) for one in seeds.summary.members]
    assert any((adapters[0][key] != adapters[1][key]).any() for key in adapters[0])
    scores = [
        json.loads((root / one.name / "metrics.json").read_text())["metrics"]["tuned"]["macro_f1"]
        for one in seeds.summary.members
    ]
    spread = seeds.summary.spread(0)
    assert spread.mean == pytest.approx(np.mean(scores))
    assert spread.deviation == pytest.approx(np.std(scores, ddof=1))
    written = json.loads((root / "sweep.json").read_text())
    assert written["settings"][0]["spread"]["macro_f1"]["count"] == 3
    assert (root / "comparison.html").is_file()
    assert not list(root.glob("together-*"))


@pytest.mark.slow
def test_each_of_a_pass_has_what_a_run_alone_leaves(place):
    many = {"data": {"eval_size": 60, "max_rows": 100}}  # enough to calibrate on
    toy_sweep(place / "many", "pass", seeds=2, rows=120, **many)
    toy_sweep(place / "many", "alone", seed=3, step="eager", rows=120, **many)
    alone, shared = place / "many" / "alone", place / "many" / "pass" / "seed-3"
    names = {path.name for path in alone.iterdir()}
    assert {"calibration.json", "report.html", "run_record.json", "data_health.json"} <= names
    assert names - {path.name for path in shared.iterdir()} == set()
    mine, theirs = (json.loads((one / "calibration.json").read_text()) for one in (shared, alone))
    assert mine["temperature"] == pytest.approx(theirs["temperature"], rel=1e-4)
    assert mine["rows"] == theirs["rows"] == 60
    mine, theirs = (json.loads((one / "run_record.json").read_text()) for one in (shared, alone))
    assert mine.keys() == theirs.keys()
    for key in ("task", "training_rows", "examples_per_step", "asking", "prompt", "splits"):
        assert mine[key] == theirs[key], key
    mine, theirs = (json.loads((one / "metrics.json").read_text()) for one in (shared, alone))
    assert mine["calibration"]["after"] == pytest.approx(theirs["calibration"]["after"], rel=1e-4)


def test_each_is_a_plain_peft_folder_that_answers_as_it_was_scored(seeds, place):
    base, _ = prepared(place)
    folder = place / "seeds" / "seed-4"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    predictor = Predictor.from_adapter(folder)
    table = pd.read_csv(folder / "predictions.csv")
    task = predictor.task
    examples = task.examples(table.rename(columns={"target": "label"}).set_index("row"))
    answers = task.answer_kind.answers(examples, predictor.outputs(examples))
    assert list(answers) == table["tuned"].tolist()


def test_each_is_the_adapter_that_its_run_alone_gives(seeds, place):
    alone = toy_sweep(place, "alone", seed=4, step="eager")
    assert alone.summary is None
    # The rows are divided by the first seed; here by the run's own.
    first = toy_sweep(place, "first", seed=3, step="eager")
    assert first.comparison is not None
    one, other = adapter_of(place / "first"), adapter_of(place / "seeds" / "seed-3")
    for key, value in one.items():
        difference = (value - other[key]).norm()
        assert difference <= 1e-6 * value.norm(), key
    metrics = json.loads((place / "first" / "metrics.json").read_text())["metrics"]
    shared = json.loads((place / "seeds" / "seed-3" / "metrics.json").read_text())["metrics"]
    for system, values in metrics.items():
        assert shared[system] == pytest.approx(values, rel=1e-5), system


def test_folds_answer_every_row_by_an_adapter_that_has_not_learnt_from_it(folds, place):
    _, file = prepared(place)
    table = pd.read_csv(place / "folds" / "out_of_fold.csv")
    assert table["row"].tolist() == list(range(1, len(pd.read_csv(file)) + 1))
    probabilities = table[[name for name in table if name.startswith("probability/")]]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert set(table["fold"]) == {1, 2, 3}
    for number in (1, 2, 3):
        own = pd.read_csv(place / "folds" / f"fold-{number}" / "predictions.csv")
        assert own["row"].tolist() == table.loc[table["fold"] == number, "row"].tolist()
    assert "every one of 60 rows was answered" in str(folds.summary)


def test_a_grid_is_chosen_by_validation_rows_and_reported_on_the_test_rows(place, capsys):
    # One half shares a pass, the other, with dropout, cannot.
    found = toy_sweep(place, "grid", grid=["learning_rate=1e-3,1e-2", "lora_dropout=0,0.1"])
    said = capsys.readouterr().out
    assert "2 adapters at once over one pass of the base: run-1, run-3" in said
    assert "one after the other: run-2, run-4 (lora_dropout is 0.1)" in said
    best = found.summary.best
    means = [found.summary.spread(number).mean for number in range(4)]
    assert means[best] == max(means)
    written = json.loads((place / "grid" / "sweep.json").read_text())["best"]
    test = json.loads((place / "grid" / f"run-{best + 1}" / "test_metrics.json").read_text())
    assert written["test"]["mean"] == pytest.approx(test["macro_f1"])
    validation = pd.read_csv(place / "grid" / "run-1" / "predictions.csv")["row"]
    trained = json.loads((place / "grid" / "run-2" / "metrics.json").read_text())["training_rows"]
    assert len(validation) == 12
    assert trained == 60 - 12 - 12


def test_a_sweep_has_one_page_that_its_folder_alone_gives_again(place, capsys):
    root = place / "grid"
    page = (root / "report.html").read_text()
    contents = json.loads((root / "report.json").read_text())
    assert [line["is_best"] for line in contents["settings"]].count(True) == 1
    means = [line["mean"] for line in contents["settings"]]
    assert means == sorted(means, reverse=True)
    assert contents["curves"].keys() == {"run-1", "run-2", "run-3", "run-4"}
    assert all(contents["curves"].values())
    for name in ("run-1", "run-4"):
        assert f'href="{name}/report.html"' in page
        assert (root / name / "report.html").is_file()
    for name in ("settings", "loss"):
        assert (root / "report_figures" / f"{name}.svg").is_file()
    (root / "report.html").unlink()
    assert main(["report", str(root)]) == 0
    again = (root / "report.html").read_text()
    assert again.replace(_moment(again), "") == page.replace(_moment(page), "")


def _moment(page):
    return page[page.index("Written ") :][:30]


def test_a_page_of_seeds_says_both_spreads(seeds, place):
    contents = json.loads((place / "seeds" / "report.json").read_text())
    [line] = contents["settings"]
    assert line["low"] < line["mean"] < line["high"]
    assert line["deviation"] == pytest.approx(seeds.summary.spread(0).deviation)


def test_what_is_finished_is_not_done_again(seeds, place, monkeypatch):
    root = place / "resumed"
    shutil.copytree(place / "seeds", root)
    shutil.rmtree(root / "seed-5")
    (root / "seed-4" / "metrics.json").unlink()  # killed before it was scored
    before = adapter_of(root / "seed-4")
    trained = []
    original = sweep_run.train_over_one_pass

    def noting(once, members, stage):
        trained.extend(members)
        return original(once, members, stage)

    monkeypatch.setattr(sweep_run, "train_over_one_pass", noting)
    found = toy_sweep(place, "resumed", seeds=3, resume_from_checkpoint="true")
    assert trained == ["seed-4", "seed-5"]
    assert found.summary.spread(0) == seeds.summary.spread(0)
    for key, value in adapter_of(root / "seed-4").items():
        assert (value == before[key]).all()


def test_a_folder_with_several_is_kept_unless_it_is_to_be_replaced(seeds, place):
    with pytest.raises(OutputFolderError, match="already holds a run"):
        toy_sweep(place, "seeds", seeds=3)
    with pytest.raises(OutputFolderError, match="already holds a run"):
        toy_sweep(place, "seeds")
    with pytest.raises(ResumeMismatchError, match="a run of other adapters"):
        toy_sweep(place, "seeds", seeds=2, resume_from_checkpoint="true")
    root = place / "replaced"
    shutil.copytree(place / "seeds", root)
    (root / "mine").mkdir()
    toy_sweep(place, "replaced", seeds=2, overwrite_output_dir=True)
    assert not (root / "seed-5").exists()
    assert (root / "mine").is_dir()
    assert (root / "seed-4" / "metrics.json").is_file()


def test_one_that_diverges_is_named_in_the_table_and_the_others_are_told(place):
    found = toy_sweep(place, "diverged", grid=["learning_rate=1e-3,1e38"])
    assert "its loss was not finite" in str(found.summary) or "its gradient" in str(found.summary)
    assert found.summary.best == 0
    assert not (place / "diverged" / "run-2" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"folds": 3, "seeds": 2}, "--folds goes with neither"),
        ({"trials": 3, "seeds": 2}, "--trials takes settings of a --grid"),
        ({"seeds": 2, "max_hours": 1.0}, "--max_hours is for a run of one adapter"),
        ({"seeds": 2, "resume_from_checkpoint": "runs/x/checkpoint-3"}, "resume_from_checkpoint"),
        ({"folds": 2, "data": {"eval_file": "other.csv"}}, "--eval_file would be ignored"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_contradictions_are_refused_before_anything_is_read(settings, says, place):
    with pytest.raises(ArgumentError, match=says):
        toy_sweep(place, "refused", **settings)
    assert not (place / "refused").exists() or not list((place / "refused").iterdir())


def sweep_on_ranks(folder, output):
    found = toy_sweep(folder, output, seeds=2, per_device_train_batch_size=4)
    return found.summary.spread(0), str(found.summary)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_give_the_same_figures(place, seeds):
    ranks = run_ranks(
        sweep_on_ranks, place, "ranks", environment=launch_environment("fsdp2_cpu.yaml")
    )
    assert ranks[0] == ranks[1]
    one, other = (adapter_of(place / name / "seed-3") for name in ("seeds", "ranks"))
    for key, value in one.items():
        np.testing.assert_allclose(other[key], value, atol=1e-3)
