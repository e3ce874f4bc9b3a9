"""Probabilities that one may act on, from the run to `predict`.

Run: python -m pytest tests/cli/test_calibrated.py
"""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from lora_fsdp import DataArguments, FineTuningArguments, LoraArguments, ModelArguments, finetune
from lora_fsdp.adapter.verification import verify_adapter_folder
from lora_fsdp.cli.main import main
from lora_fsdp.evaluation.calibration import CALIBRATION_FILE
from lora_fsdp.reporting import write_report
from lora_fsdp.training.saving.atomic_folders import check_whole
from tests.support.reported import made_up_run
from tests.support.tiny import LABELS, toy_table


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(model_folder, folder, **data):
    folder.mkdir()
    # Some labels are wrong, so that no model is always right.
    table = toy_table(220)
    wrong = table.index[::7]
    table.loc[wrong, "label"] = table.loc[wrong, "label"].map(
        dict(zip(LABELS, (*LABELS[1:], LABELS[0]), strict=True))
    )
    table.to_csv(folder / "table.csv", index=False)
    finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            task="classification",
            instruction="Say how it sounds:",
            text_column="text",
            label_column="label",
            data_file=str(folder / "table.csv"),
            max_length=128,
            **data,
        ),
        training_args=FineTuningArguments(
            output_dir=str(folder / "run"),
            num_train_epochs=1,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-2,
            probe_rows=40,
        ),
    )
    return folder / "run"


@pytest.fixture(scope="module")
def apart(model_folder, tmp_path_factory):
    """A run with rows for a test, calibrated on others."""
    return train(model_folder, tmp_path_factory.mktemp("a") / "run", eval_size=80, test_size=60)


@pytest.fixture(scope="module")
def crossed(model_folder, tmp_path_factory):
    """A run with one set of held-out rows."""
    return train(model_folder, tmp_path_factory.mktemp("b") / "run", eval_size=80)


def call(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def predictions_of(run):
    return pd.read_csv(run / "predictions.csv", keep_default_na=False)


def answered(capsys, run, output, *more):
    table = output.with_name("in.csv")
    predictions_of(run)[["text", "target"]].to_csv(table, index=False)
    code, said, error = call(capsys, "predict", table, "--adapter", run, "--output", output, *more)
    assert code == 0, error
    return pd.read_csv(output, keep_default_na=False), said


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize("which", ["apart", "crossed"])
def test_it_is_saved_with_the_adapter(which, request):
    run = request.getfixturevalue(which)
    facts, saved = metrics_of(run)["calibration"], json.loads((run / CALIBRATION_FILE).read_text())
    assert facts["rows"] == saved["rows"] == len(saved["scores"]) == 80
    assert facts["apart"] == saved["apart"] == (which == "apart")
    assert facts["after"]["loss"] <= facts["before"]["loss"] + 0.05
    assert CALIBRATION_FILE in check_whole(run)["files"]
    assert all(check.outcome != "failed" for check in verify_adapter_folder(run).checks)


def test_an_edit_is_noticed(apart, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(apart, copy)
    changed = json.loads((copy / CALIBRATION_FILE).read_text()) | {"temperature": 3.0}
    (copy / CALIBRATION_FILE).write_text(json.dumps(changed))
    code, said, _ = call(capsys, "verify", copy)
    assert code != 0
    assert f"{CALIBRATION_FILE} was changed" in said
    changed["temperature"] = -1
    (copy / CALIBRATION_FILE).write_text(json.dumps(changed))
    asked = ("predict", "--text", "a bad flight", "--adapter", copy)
    code, _, error = call(capsys, *asked)
    assert (code, "--calibrated false" in error) == (2, True)
    assert call(capsys, *asked, "--calibrated", "false")[0] == 0


def test_predict_gives_what_the_report_shows(apart, tmp_path, capsys):
    shown = predictions_of(apart)
    found, said = answered(capsys, apart, tmp_path / "out.csv")
    assert "probabilities are calibrated: temperature" in " ".join(said.split())
    assert found["predicted_label"].tolist() == shown["tuned"].tolist()
    np.testing.assert_allclose(found["probability"], shown["probability"], atol=1e-4)
    raw, said = answered(capsys, apart, tmp_path / "raw.csv", "--calibrated", "false")
    assert "calibrated" not in said
    assert np.abs(raw["probability"] - found["probability"]).max() > 1e-3


def test_rows_that_are_reported_are_calibrated_by_the_others(crossed, tmp_path, capsys):
    """The answers are those of `predict`, and the probabilities nearly."""
    shown = predictions_of(crossed)
    found, _ = answered(capsys, crossed, tmp_path / "out.csv")
    assert found["predicted_label"].tolist() == shown["tuned"].tolist()
    difference = np.abs(found["probability"] - shown["probability"]).max()
    assert 1e-6 < difference < 0.1


def test_evaluate_reads_answers_as_the_run_does(apart, tmp_path, capsys):
    table = tmp_path / "test.csv"
    shown = predictions_of(apart).rename(columns={"target": "label"})
    shown[["text", "label"]].to_csv(table, index=False)
    _, out, _ = call(capsys, "evaluate", table, "--adapter", apart, "--json")
    found = json.loads(out)["metrics"]
    assert found == pytest.approx(metrics_of(apart)["metrics"]["tuned"], abs=1e-4)


def test_a_least_probability(apart, tmp_path, capsys):
    every, _ = answered(capsys, apart, tmp_path / "every.csv")
    least = float(every["probability"].median())
    found, said = answered(capsys, apart, tmp_path / "out.csv", "--min_probability", f"{least:.6f}")
    sure = every["probability"] >= round(least, 6)
    assert 0 < sure.sum() < len(sure)
    assert (found["predicted_label"] != "").tolist() == sure.tolist()
    assert found["probability"].tolist() == every["probability"].tolist()
    assert f"{(~sure).sum()} of {len(sure)} answers are left empty" in " ".join(said.split())


def test_sets_of_answers(apart, tmp_path, capsys):
    found, _ = answered(capsys, apart, tmp_path / "out.csv", "--coverage", "0.9")
    sets = [json.loads(cell) for cell in found["answer_set"]]
    assert [one[0] for one in sets] == found["predicted_label"].tolist()
    held = [target in one for target, one in zip(found["target"], sets, strict=True)]
    assert np.mean(held) > 0.8  # 60 rows
    narrow, _ = answered(capsys, apart, tmp_path / "half.csv", "--coverage", "0.5")
    sizes = [len(json.loads(cell)) for cell in narrow["answer_set"]]
    assert sum(sizes) < sum(map(len, sets))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--coverage", "1.5"], "--coverage 1.5"),
        (["--min_probability", "0"], "--min_probability 0.0"),
        (["--coverage", "0.9", "--calibrated", "false"], "need the calibration"),
    ],
)
def test_refused(apart, tmp_path, capsys, options, words):
    table = tmp_path / "in.csv"
    table.write_text("text\na bad flight\n")
    output = tmp_path / "out.csv"
    code, _, error = call(
        capsys, "predict", table, "--adapter", apart, "--output", output, *options
    )
    assert code == 2
    assert words in error
    assert not output.exists()


def test_report_and_card_agree(apart, crossed):
    page, card = ((apart / name).read_text() for name in ("report.html", "README.md"))
    assert "validation rows, none of which is shown here" in page
    assert "held-out rows in five folds" in (crossed / "report.html").read_text()
    assert "Scores on 60 test rows" in card
    assert "| validation rows | 80 |" in card
    assert "calibration.json" in card
    facts = metrics_of(apart)
    assert facts["probe_rows"] == 40
    for text in (page, card):
        assert "has learnt from 40 training rows." in text
        assert f"The untrained model is read {facts['untrained']['way']}" in text
    contents = json.loads((apart / "report.json").read_text())
    levels = contents["answers"]["levels"]
    assert levels[0]["rows"] == 60
    assert [line["rows"] for line in levels] == sorted((x["rows"] for x in levels), reverse=True)
    shown = predictions_of(apart)
    for line in levels:
        chosen = shown[shown["probability"] >= line["level"]]
        assert line["rows"] == len(chosen)
        right = (chosen["tuned"] == chosen["target"]).mean()
        assert line["accuracy"]["value"] == pytest.approx(right)
        assert line["accuracy"]["low"] <= right <= line["accuracy"]["high"]


def test_the_report_says_what_a_least_probability_gives(tmp_path):
    page = write_report(made_up_run(tmp_path, held_out=300, skill=3.0)).read_text()
    assert "Answering only where it is sure" in page
    levels = json.loads((tmp_path / "report.json").read_text())["answers"]["levels"]
    assert len(levels) > 4
    assert levels[-1]["accuracy"]["value"] > levels[0]["accuracy"]["value"]
