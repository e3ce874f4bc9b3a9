"""A kind of answer is one object: any task with labels gets all, and a new kind is one class.

Run: python -m pytest tests/evaluation/test_kinds_of_answers.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    ModelArguments,
    Prompt,
    Task,
    finetune,
    register_task,
)
from lora_fsdp.cli.main import main
from lora_fsdp.tasks import ClassificationTask, Example, GenerationTask
from lora_fsdp.tasks.answers import AnswerKind, ModelOutputs
from tests.support.tiny import LABELS, ToyTask, toy_table

SCORES = ("1", "2", "3", "4", "5")


class OwnTask(Task):
    """Labels without `ClassificationTask`, with the prompts of `ToyTask`."""

    name = "tests-own-labels"
    labels = LABELS

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        return Prompt(f"Instruction: {ToyTask.instruction}\nInput: ", row["text"], "\nOutput:")

    def build_target(self, row: Mapping[str, Any]) -> str:
        return self.target_of(row["label"])

    def split_columns(self) -> tuple[str, str]:
        return "text", "label"


class OrderedScores(AnswerKind):
    """A score from 1 to 5, the one nearest to the expected value."""

    name = "ordered_scores"
    description = "a score from 1 to 5, by its expected value"
    labels = SCORES
    answer_column = "predicted_score"

    def candidates(self, example: Example) -> Sequence[str]:
        return [f" {score}" for score in SCORES]

    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str]:
        return [str(round(value)) for value in expected(outputs)]

    def probabilities(self, outputs: ModelOutputs) -> Sequence[float]:
        places = [round(value) - 1 for value in expected(outputs)]
        rows = zip(outputs.probabilities.tolist(), places, strict=True)
        return [probabilities[place] for probabilities, place in rows]

    def metrics_of_outputs(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, float]:
        right = [int(self.answer_of(example)) for example in examples]
        return {"mean_absolute_error": float(np.abs(expected(outputs) - right).mean())}

    def run_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[float]]:
        return {"expected_score": expected(outputs).tolist()}


def expected(outputs: ModelOutputs) -> np.ndarray:
    """[N] from 1 to 5."""
    return outputs.probabilities @ np.arange(1.0, 6.0)


@register_task
class StarsTask(Task):
    """Stars of a review."""

    name = "tests-stars"
    answer_kind = OrderedScores()

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        return Prompt("How many stars?\nInput: ", row["text"], "\nOutput:")

    def build_target(self, row: Mapping[str, Any]) -> str:
        return f" {row['stars']}"


class EchoTask(OwnTask):
    """Free text."""

    name = "tests-echo-labels"
    labels = None


def train(
    task: Task, base: Path, output: Path, table: pd.DataFrame, **options: Any
) -> dict[str, Any]:
    """A finished run's metrics, and its predictions under "table"."""
    output.mkdir()
    table.to_csv(output.parent / f"{output.name}.csv", index=False)
    finetune(
        model_args=ModelArguments(model_name_or_path=str(base)),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            data_file=str(output.parent / f"{output.name}.csv"), max_length=128, eval_size=12
        ),
        training_args=FineTuningArguments(
            output_dir=str(output),
            num_train_epochs=1,
            eval_strategy="epoch",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        ),
        task=task,
    )
    found = json.loads((output / "metrics.json").read_text())
    return found | {"table": pd.read_csv(output / "predictions.csv")}


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_labels_without_a_classification_task(model_folder: Path, tmp_path: Path) -> None:
    """The same rows and prompts give the same files, columns, counts and report."""
    own = train(OwnTask(), model_folder, tmp_path / "own", toy_table(48))
    built_in = train(ToyTask(), model_folder, tmp_path / "toy", toy_table(48))
    assert files_of(tmp_path / "own") == files_of(tmp_path / "toy")
    assert "confusion_matrix.png" in files_of(tmp_path / "own")
    assert {f"probability/{label}" for label in LABELS} < set(own["table"].columns)
    pd.testing.assert_frame_equal(own["table"], built_in["table"])
    assert own["confusion_matrix"] == built_in["confusion_matrix"]
    assert len(own["confusion_matrices"]) == 1
    assert own["confusion_matrices"] == built_in["confusion_matrices"]
    assert (own["primary_metric"], built_in["primary_metric"]) == ("exact_match", "macro_f1")
    for system, metrics in built_in["metrics"].items():
        own["metrics"][system].pop("exact_match")
        assert own["metrics"][system] == metrics
    reports = [report_of(tmp_path / name) for name in ("own", "toy")]
    assert reports[0]["answers"] is not None
    for part in ("answers", "health"):
        assert reports[0][part] == reports[1][part]


def test_a_kind_of_its_own(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, evaluation while it runs, report and `predict` know nothing of the kind."""
    table = toy_table(48).assign(stars=[1 + number % 5 for number in range(48)])
    run = tmp_path / "stars"
    found = train(StarsTask(), model_folder, run, table)
    assert f"answers: {OrderedScores.description}" in capsys.readouterr().out
    answers = found["table"]
    error = (answers["expected_score"] - answers["target"]).abs().mean()
    assert found["metrics"]["tuned"]["mean_absolute_error"] == pytest.approx(error)
    assert answers["tuned"].tolist() == answers["expected_score"].round().tolist()
    log = (run / "log_history.jsonl").read_text().splitlines()
    evaluated = [json.loads(line) for line in log if "eval_loss" in line]
    assert [set(line) >= {"eval_mean_absolute_error", "eval_exact_match"} for line in evaluated]
    assert evaluated[-1]["eval_mean_absolute_error"] == pytest.approx(error)

    report = report_of(run)
    assert [report[name] is not None for name in ("answers", "choices", "free_text")] == [
        False,
        True,
        False,
    ]
    assert report["choices"]["rows"] == 12
    assert "mean_absolute_error" in report["scores"]["metrics"]
    assert "mean absolute error" in (run / "report.html").read_text()

    asked = tmp_path / "asked.csv"
    answers[["text"]].to_csv(asked, index=False)
    words = ["predict", asked, "--adapter", run, "--output", tmp_path / "answered.csv"]
    assert main([str(word) for word in words]) == 0
    answered = pd.read_csv(tmp_path / "answered.csv")
    assert list(answered) == ["text", "predicted_score", "probability", "expected_score"]
    assert answered["predicted_score"].tolist() == answers["tuned"].tolist()
    np.testing.assert_allclose(answered["expected_score"], answers["expected_score"], rtol=1e-4)


class KindTask(GenerationTask):
    """Free text measured by a mean over the rows."""

    name = "tests-kind-words"
    label_column = "label"


def test_a_mean_over_the_rows_has_an_interval(model_folder: Path, tmp_path: Path) -> None:
    found = train(KindTask(), model_folder, tmp_path / "words", toy_table(48), max_new_tokens=4)
    scores = {
        entry["system"]: entry["scores"]
        for entry in report_of(tmp_path / "words")["scores"]["systems"]
    }
    for system in ("untrained", "tuned"):
        column = found["table"][f"score/token_f1/{system}"]
        value = found["metrics"][system]["token_f1"]
        assert column.mean() == pytest.approx(value)
        shown = scores[system]["token_f1"]
        assert shown["value"] == pytest.approx(value)
        assert shown["low"] <= value <= shown["high"]


def test_a_run_says_what_is_odd_about_its_rows(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `tasks check` and the doctor do, before it trains; what has no row is not counted."""

    class RareTask(ToyTask):
        labels = (*LABELS, "never seen")

    found = train(RareTask(), model_folder, tmp_path / "rare", toy_table(48))
    said = capsys.readouterr().out
    assert "warning: No held-out row, so nothing is measured of them: 'never seen'." in said
    assert "warning: Fewer than 10 training rows: 'never seen'." in said
    assert said.index("warning:") < said.index("Scoring the untrained model")
    assert found["labels_without_held_out_rows"] == ["never seen"]
    assert "1 of 4 labels has no held-out row" in said
    assert report_of(tmp_path / "rare")["scores"]["labels_without_rows"] == {"count": 1, "of": 4}


@pytest.mark.parametrize("task", [ToyTask(), EchoTask()], ids=lambda task: task.name)
def test_a_held_out_row_is_tokenised_once(
    task: Task, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is scored, and generated for."""
    seen: Counter[str] = Counter()
    call = PreTrainedTokenizerBase.__call__

    def counting(self: PreTrainedTokenizerBase, text: Any = None, *more: Any, **options: Any):
        seen.update([text] if isinstance(text, str) else text)
        return call(self, text, *more, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counting)
    table = train(
        task, model_folder, tmp_path / "run", toy_table(48), generate_examples=2, max_new_tokens=4
    )["table"]
    for text in table["text"]:
        assert sum(count for asked, count in seen.items() if text in asked) == 1


def test_a_classification_is_a_closed_set_before_it_knows_its_labels() -> None:
    kind = ClassificationTask().answer_kind
    assert (kind.name, kind.labels) == ("closed_set", ())
    assert not ClassificationTask().is_free_text
