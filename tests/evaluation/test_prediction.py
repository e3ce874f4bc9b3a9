"""A finished adapter asked again gives the answers of its own training run.

Run: python -m pytest tests/evaluation/test_prediction.py
"""

import json

import pandas as pd
import pytest
import torch

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
from lora_fsdp.errors import (
    AdapterVerificationError,
    ModelNotFoundError,
    UnknownTaskError,
)
from lora_fsdp.evaluation.prediction import TASK_FILE, Predictor
from lora_fsdp.evaluation.untrained import ways_of_reading
from tests.support.tiny import toy_table

OPTIONS = {"text_column": "text", "label_column": "label", "instruction": "Say how it sounds:"}


@register_task
class EchoTask(Task):
    """Free text: repeat the last word."""

    name = "tests-echo"

    def build_prompt(self, row):
        return Prompt("Repeat the word.\nInput: ", str(row["text"]), "\nOutput:")

    def build_target(self, row):
        return f" {row['answer']}"


class LengthTask(EchoTask):
    """Free text with a metric of its own."""

    name = "tests-length"
    primary_metric = "same_length"

    def compute_metrics(self, targets, predictions):
        same = [len(t) == len(p or "") for t, p in zip(targets, predictions, strict=True)]
        return {"same_length": sum(same) / len(same)}


def run(model_folder, output, table, *, task="classification", task_object=None, **options):
    output.mkdir(parents=True, exist_ok=True)
    file = output.parent / f"{output.name}.csv"
    table.to_csv(file, index=False)
    is_named = task_object is None
    return finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            task=task if is_named else "",
            data_file=str(file),
            max_length=128,
            eval_size=8,
            **(options.pop("data", {})),
        ),
        training_args=FineTuningArguments(
            output_dir=str(output),
            num_train_epochs=2,
            learning_rate=1e-2,
            disable_tqdm=True,
            **{"save_strategy": "no", **options},
        ),
        task=task_object,
    )


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    return run(model_folder, tmp_path_factory.mktemp("runs") / "toy", toy_table(40), data=OPTIONS)


def held_out_examples(predictor, predictions):
    table = pd.DataFrame({"text": predictions["text"], "label": predictions["target"]})
    return predictor.task.examples(table)


def test_same_answers_and_probabilities(finished):
    predictor = Predictor.from_adapter(finished.output_dir)
    predictions = pd.read_csv(finished.output_dir / "predictions.csv")
    scores = predictor.score(held_out_examples(predictor, predictions))
    answers = [predictor.task.labels[best] for best in scores.best]
    assert answers == predictions["tuned"].tolist()
    torch.testing.assert_close(
        scores.probabilities.amax(dim=1),
        torch.tensor(predictions["probability"].to_numpy(), dtype=torch.float32),
    )


def test_the_adapter_matters(finished):
    predictor = Predictor.from_adapter(finished.output_dir)
    predictions = pd.read_csv(finished.output_dir / "predictions.csv")
    examples = held_out_examples(predictor, predictions)
    with predictor.model.disable_adapter():
        scores, outputs = predictor.score(examples), predictor.outputs(examples)
    facts = json.loads((finished.output_dir / "metrics.json").read_text())
    read = ways_of_reading(predictor.task, outputs, scores)[facts["untrained"]["way"]]
    base = predictor.task.answer_kind.answers(examples, read)
    assert base == predictions["base"].tolist()
    assert base != predictions["tuned"].tolist()


def test_task_is_restored_as_it_was(finished):
    saved = json.loads((finished.output_dir / TASK_FILE).read_text())
    assert saved["options"]["labels"] == ["negative", "neutral", "positive"]
    predictor = Predictor.from_adapter(finished.output_dir)
    assert predictor.task.options() == saved["options"]
    assert predictor.encoder.max_length == 128


def test_writing(finished):
    predictor = Predictor.from_adapter(finished.output_dir)
    examples = predictor.task.examples(toy_table(3))
    texts = predictor.write(examples, max_new_tokens=4)
    assert len(texts) == 3


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(AdapterVerificationError, match=rf"holds no {TASK_FILE}"):
        Predictor.from_adapter(tmp_path)


def test_task_that_is_not_registered(finished, tmp_path):
    for file in finished.output_dir.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    saved = json.loads((tmp_path / TASK_FILE).read_text()) | {"task": "clasification"}
    (tmp_path / TASK_FILE).write_text(json.dumps(saved))
    with pytest.raises(UnknownTaskError, match="'classification'"):
        Predictor.from_adapter(tmp_path)


def test_base_that_moved_away(finished, tmp_path):
    for file in finished.output_dir.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFoundError, match="moved"):
        Predictor.from_adapter(tmp_path)


def echo_table(count=32):
    words = ["good", "bad", "late", "crew"]
    rows = [{"text": f"bag {i} {words[i % 4]}", "answer": words[i % 4]} for i in range(count)]
    return pd.DataFrame(rows)


def test_free_text_from_end_to_end(model_folder, tmp_path, capsys):
    result = run(
        model_folder, tmp_path / "echo", echo_table(), task="tests-echo", generate_examples=3
    )
    metrics = json.loads((result.output_dir / "metrics.json").read_text())
    assert metrics["primary_metric"] == "exact_match"
    assert set(metrics["metrics"]) == {"untrained", "tuned"}
    assert 0 <= metrics["metrics"]["tuned"]["exact_match"] <= 1
    assert metrics["metrics"]["tuned"]["loss"] < metrics["metrics"]["untrained"]["loss"]
    assert len(metrics["written"]) == 3
    assert not (result.output_dir / "confusion_matrix.png").exists()
    assert "Too few held-out rows to tell: 8." in capsys.readouterr().out
    predictor = Predictor.from_adapter(result.output_dir)
    scores = predictor.score(predictor.task.examples(echo_table(4)))
    assert scores.log_likelihoods.shape == (4, 1)


def test_free_text_task_is_measured_by_its_own_metric(model_folder, tmp_path):
    """Of what the models wrote, which `predictions.csv` keeps."""
    result = run(model_folder, tmp_path / "length", echo_table(), task_object=LengthTask())
    metrics = json.loads((result.output_dir / "metrics.json").read_text())
    answers = pd.read_csv(result.output_dir / "predictions.csv", keep_default_na=False, dtype=str)
    for column, system in (("base", "untrained"), ("tuned", "tuned")):
        same = answers[column].str.len() == answers["target"].str.len()
        assert metrics["metrics"][system]["same_length"] == same.mean()
    assert metrics["metrics"]["tuned"]["same_length"] > 0
    assert metrics["primary_metric"] == "same_length"


class TestSplits:
    """A run with rows for a test: chosen on some, reported on others."""

    CHOOSES = {  # noqa: RUF012
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "macro_f1",
    }

    def test_the_test_is_what_is_reported(self, model_folder, tmp_path):
        data = {**OPTIONS, "test_size": 0.25}
        table = toy_table(60)
        done = run(model_folder, tmp_path / "run", table, data=data, **self.CHOOSES)
        metrics = json.loads((done.output_dir / "metrics.json").read_text())
        assert (metrics["training_rows"], metrics["validation_rows"]) == (37, 8)
        assert metrics["held_out_rows"] == len(done.comparison.predictions) == 15
        assert metrics["chosen_among"] is None
        log = (done.output_dir / "log_history.jsonl").read_text().splitlines()
        evaluated = [json.loads(line) for line in log if "eval_macro_f1" in line]
        assert len(evaluated) == 2
        tuned = metrics["metrics"]["tuned"]
        assert all(one["eval_loss"] != pytest.approx(tuned["loss"]) for one in evaluated)
        tested = set(done.comparison.predictions["text"])
        predictor = Predictor.from_adapter(done.output_dir)
        examples = predictor.task.examples(table)
        chosen = [one for one in examples if one.prompt.content in tested]
        outputs = predictor.outputs(predictor.encoder.encode(chosen))
        kind = predictor.task.answer_kind
        assert kind.answers(chosen, outputs) == list(done.comparison.predictions["tuned"])

    def test_without_one_the_verdict_says_on_which_rows_it_was_chosen(self, model_folder, tmp_path):
        done = run(model_folder, tmp_path / "run", toy_table(60), data=OPTIONS, **self.CHOOSES)
        sentence = "chosen among 2 checkpoints on these rows"
        assert sentence in str(done.comparison)
        assert sentence in (done.output_dir / "report.html").read_text()
        assert sentence in (done.output_dir / "README.md").read_text()
