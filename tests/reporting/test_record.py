"""What a run writes down for its report. Run: python -m pytest tests/reporting/test_record.py"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import lora_fsdp.pipeline
from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    FineTuningResult,
    LoraArguments,
    ModelArguments,
    finetune,
)
from lora_fsdp.claiming import claim_output_folder
from lora_fsdp.errors import OutputFolderError
from lora_fsdp.evaluation.outputs import LOG_FILE, PROBE
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.reporting import write_report
from lora_fsdp.reporting.recording.environment import _masked, launch_command, source_commit
from lora_fsdp.reporting.report import try_to_write_report
from lora_fsdp.reporting.run_files import RECORD_FILES
from lora_fsdp.training.logging.log_history import KeepLog
from tests.support.runs import toy_trainer
from tests.support.tiny import toy_table


def tune(model_folder: Path, output: Path, **training: object) -> FineTuningResult:
    table = output.parent / f"{output.name}.csv"
    toy_table(60).to_csv(table, index=False)
    options = {"max_steps": 6, "save_strategy": "no", "learning_rate": 1e-2, **training}
    return finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            task="classification",
            data_file=str(table),
            text_column="text",
            label_column="label",
            max_length=128,
            eval_size=12,
        ),
        training_args=FineTuningArguments(
            output_dir=str(output), logging_steps=2, disable_tqdm=True, **options
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The script that seems to run, with words that a shell would take apart.

    Where several workers share the tests, the command of their own process is none to repeat.
    """
    path = tmp_path_factory.mktemp("scripts") / "train.py"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), "--instruction", 'it\'s $HOME: "a b"'])
        yield path


@pytest.fixture(scope="module")
def run(script: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "it's a run"
    return tune(model_folder, output, save_strategy="steps", save_steps=3).output_dir


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_run_ends_with_its_report(run: Path) -> None:
    found = read(run / "report.json")
    assert (run / "report.html").is_file()
    assert found["missing"] == []
    assert found["curves"]["loss"] == [
        [entry["step"], entry["loss"]]
        for entry in map(json.loads, (run / LOG_FILE).read_text().splitlines())
        if "loss" in entry
    ]
    assert [step for step, _ in found["curves"]["loss"]] == [2, 4, 6]
    assert found["progress"]["max_steps"] == 6
    assert found["asked"]["settings"]["training"]["max_steps"] == "6"
    assert "hub_token" not in found["asked"]["settings"]["training"]
    assert found["asked"]["versions"]["torch"]
    assert found["asked"]["adapter"].startswith("LoRA, r 8, alpha 32, dropout 0, on down_proj, ")
    assert found["fsdp"]["ranks"][0]["adapter_parameters"] > 0
    assert found["health"]["balance"]["negative"]["training"] == 16
    systems = {line["system"]: line["scores"] for line in found["scores"]["systems"]}
    assert set(systems) == {"majority", "TF-IDF + logistic", PROBE, "untrained", "tuned"}
    for scores in systems.values():
        assert scores["accuracy"]["low"] is not None
        assert scores["macro_f1"]["low"] is not None
    for difference in found["scores"]["differences"].values():
        assert difference["low"] is not None


def test_tokens_are_counted(run: Path) -> None:
    metrics, health = read(run / "metrics.json"), read(run / "data_health.json")
    mean = health["tokens"]["training"]["total"] / metrics["training_rows"]
    speed = metrics["tokens_per_second"] / metrics["examples_per_second"]
    assert speed == pytest.approx(mean)


def test_the_load_snippet_runs_and_writes_what_this_library_does(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    snippet = read(run / "report.json")["usage"]["load"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(snippet, "snippet", "exec"), {})
    predictor, prompt = Predictor.from_adapter(run), read(run / "run_record.json")["prompt"]
    table = pd.DataFrame({"text": [prompt["text"]]})
    examples = predictor.task.examples(table, with_targets=False)
    [written] = predictor.write(examples, max_new_tokens=prompt["longest_answer_tokens"])
    assert output.getvalue().strip() == written.strip() != ""


def test_the_predict_snippet_runs_and_gives_the_runs_probability(run: Path) -> None:
    snippet = read(run / "report.json")["usage"]["predict"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(snippet, "snippet", "exec"), {})
    first = pd.read_csv(run / "predictions.csv").iloc[0]
    label, probability = output.getvalue().split()
    assert label == first["tuned"]
    assert float(probability) == pytest.approx(first["probability"], abs=1e-3)


def test_the_resume_command_names_the_last_checkpoint(run: Path) -> None:
    usage = read(run / "report.json")["usage"]
    assert usage["checkpoint"] == "checkpoint-6"
    assert usage["resume"].endswith("--resume_from_checkpoint true")
    # A shell takes it apart into the words of the command that is running now.
    command = usage["resume"].partition("\n")[2]
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    )
    assert words.stdout.splitlines()[:-2] == launch_command()


@pytest.mark.slow
def test_a_resumed_run_keeps_one_log(tmp_path: Path) -> None:
    def train(steps: int, resume: bool) -> KeepLog:
        log = KeepLog(tmp_path)
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 4}
        trainer = toy_trainer(tmp_path, callbacks=[log], **options)
        trainer.train(resume_from_checkpoint=resume)
        return log

    train(4, resume=False)
    path = tmp_path / LOG_FILE
    path.write_text(path.read_text() + '{"step": 5, "loss": 99.0}\n')  # after the checkpoint
    assert train(6, resume=True).first_step == 4
    begin, *entries = map(json.loads, path.read_text().splitlines())
    assert begin == {"max_steps": 6, "first_step": 4}
    losses = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[5] < 99


def test_a_failed_report_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.json").write_text("{")
    assert try_to_write_report(tmp_path) is None
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("The report could not be written (DamagedRunError: ")
    assert "metrics.json is damaged" in line


def test_a_run_that_breaks_off_can_be_reported_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lora_fsdp.pipeline, "compare_run", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(model_folder, tmp_path / "run")
    found = read(write_report(tmp_path / "run").with_suffix(".json"))
    assert not found["finished"]
    assert [step for step, _ in found["curves"]["loss"]] == [2, 4, 6]
    assert found["usage"]["load"] is not None  # the adapter was saved by then
    assert found["health"] is not None
    assert len(found["missing"]) == 2


def test_a_record_alone_does_not_keep_another_run_out(tmp_path: Path) -> None:
    for name in RECORD_FILES:
        (tmp_path / name).write_text("{}")
    arguments = FineTuningArguments(output_dir=str(tmp_path))
    assert claim_output_folder(arguments) == tmp_path
    (tmp_path / "report.html").write_text("a report that someone asked for")
    with pytest.raises(OutputFolderError):
        claim_output_folder(arguments)
    arguments.overwrite_output_dir = True
    assert claim_output_folder(arguments) == tmp_path


def test_the_log_is_written_as_it_comes(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, rows=16, num_train_epochs=1, callbacks=[KeepLog(tmp_path)])
    trainer.train()
    begin, *entries = map(json.loads, (tmp_path / LOG_FILE).read_text().splitlines())
    assert begin == {"max_steps": 2, "first_step": 0}
    assert [{k: v for k, v in one.items() if k != "time"} for one in entries] == (
        trainer.state.log_history
    )
    assert entries[0]["time"] <= entries[-1]["time"]


def test_secrets_are_masked() -> None:
    command = ["train.py", "--hub_token", "hf_abc", "--api-key=xyz", "--seed", "1", "--hub_token"]
    assert _masked(command) == [
        "train.py",
        "--hub_token",
        "***",
        "--api-key=***",
        "--seed",
        "1",
        "--hub_token",
    ]


def test_the_command_is_the_running_one(script: Path) -> None:
    command = launch_command()
    assert command == [sys.executable, *sys.argv]
    assert command[1] == str(script)


def test_only_an_own_checkout_has_a_commit(tmp_path: Path) -> None:
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("x = 1\n")
    assert source_commit(package) is None

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path / "project"), *identity, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = source_commit(package)
    assert clean is not None
    assert len(clean) == 12
    (package / "code.py").write_text("x = 2\n")
    assert source_commit(package) == f"{clean}+changes"
    inner = package / "inner"
    inner.mkdir()
    assert source_commit(inner) is None  # inside a checkout that is not its own
