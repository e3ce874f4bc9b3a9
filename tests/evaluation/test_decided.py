"""Thresholds that validation rows choose: saved with the adapter, and fair to its rivals.

Run: python -m pytest tests/evaluation/test_decided.py
"""

import json

import numpy as np
import pandas as pd
import pytest

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    ModelArguments,
    Predictor,
    evaluate,
    finetune,
    load_table,
)
from lora_fsdp.data.rows import load_task_data
from lora_fsdp.tasks import MultilabelTask
from lora_fsdp.tasks.answers.several_labels import best_thresholds, chosen_thresholds
from tests.support.adapters import save_base
from tests.tasks.test_multilabel import random_rows

LABELS = ("late", "bag", "crew")
SEED = 3


def table_of(rows: int = 90) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    there = generator.random((rows, 3)) < [0.6, 0.3, 0.2]
    return pd.DataFrame(
        {
            "text": [
                " ".join([*np.array(LABELS)[row], "flight", str(n)]) for n, row in enumerate(there)
            ],
            "labels": [";".join(np.array(LABELS)[row]) or "none" for row in there],
        }
    )


def arguments_of(file, **options) -> DataArguments:
    return DataArguments(
        task="multilabel", data_file=str(file), max_length=128, eval_size=25, **options
    )


def trained(folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    table_of().to_csv(folder / "table.csv", index=False)
    data = arguments_of(folder / "table.csv", **options)
    result = finetune(
        model_args=ModelArguments(str(save_base(folder / "base"))),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=data,
        training_args=FineTuningArguments(
            output_dir=str(folder / "run"),
            num_train_epochs=4,
            learning_rate=1e-2,
            disable_tqdm=True,
            save_strategy="no",
            seed=SEED,
        ),
    )
    return result, load_task_data(data, seed=SEED)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("decided"), test_size=20)


def test_validation_rows_choose_and_the_adapter_keeps_it(run):
    result, data = run
    folder = result.output_dir
    options = json.loads((folder / "task.json").read_text())["options"]
    predictor = Predictor.from_adapter(folder)
    kind = predictor.task.answer_kind
    assert not set(one.row for one in data.held_out) & set(one.row for one in data.test)
    right = np.array([one.shares[::2] for one in data.held_out], dtype=bool)
    chosen = best_thresholds(right, kind.applying(predictor.outputs(data.held_out)))
    assert list(options["thresholds"]) == sorted(LABELS)
    np.testing.assert_allclose(list(options["thresholds"].values()), chosen, atol=1e-4)
    assert any(value != 0.5 for value in options["thresholds"].values())

    predictions = result.comparison.predictions
    assert set(predictions["row"]) == {one.row for one in data.test}
    outputs = predictor.outputs(data.test)
    assert list(kind.answers(data.test, outputs)) == list(predictions["tuned"])
    asked = predictor.predict([one.prompt.text for one in data.test])
    assert list(asked["predicted_labels"]) == list(predictions["tuned"])
    given = kind.applying(outputs) >= np.array(list(options["thresholds"].values()))
    named = ["; ".join(np.array(sorted(LABELS))[row]) or "none" for row in given]
    assert list(predictions["tuned"]) == named


def test_metrics_and_pages_say_it(run, tmp_path):
    result, data = run
    metrics = json.loads((result.output_dir / "metrics.json").read_text())
    thresholds = json.loads((result.output_dir / "task.json").read_text())["options"]["thresholds"]
    decided = metrics["decided"]
    assert (decided["rows"], decided["options"]) == (25, {"thresholds": thresholds})
    sentence = f"25 validation rows have decided: {decided['says']}"
    assert "bag from 0." in decided["says"]
    for place in ("report.html", "README.md"):
        assert sentence in (result.output_dir / place).read_text().replace("\\", "")
    assert sentence in str(result.comparison)
    rows = table_of().iloc[[one.row - 1 for one in data.test]]
    rows.to_csv(tmp_path / "test.csv", index=False)
    again = evaluate(result.output_dir, load_table(tmp_path / "test.csv"))
    assert again.metrics["micro_f1"] == pytest.approx(metrics["metrics"]["tuned"]["micro_f1"])


def test_every_rival_has_thresholds_that_other_rows_chose(run):
    """Its score with 0.5 would make the tuned model look better than it is."""
    result, data = run
    kind = data.task.answer_kind
    rivals = dict(kind.classic(data.train, data.test))
    predictor = Predictor.from_adapter(result.output_dir)
    with predictor.model.disable_adapter():
        rivals["untrained"] = predictor.outputs(data.test)
    assert len(rivals) == 3
    for name, outputs in rivals.items():
        found, own = result.comparison.metrics[name], kind.metrics_of_outputs(data.test, outputs)
        assert found["micro_f1"] == pytest.approx(own["micro_f1_at_thresholds"]), name
        assert found["macro_f1"] == pytest.approx(own["macro_f1_at_thresholds"]), name
        assert "micro_f1_at_thresholds" not in found


def test_outputs_that_are_decided_answer_as_their_own_thresholds_would():
    task, examples, outputs, right, applying = random_rows()
    kind = MultilabelTask(labels=task.labels, thresholds={"crew": 0.7, "price": 0.2}).answer_kind
    moved = kind.as_decided(examples, outputs)
    plain = task.answer_kind.metrics_of_outputs(examples, outputs)
    answers = kind.answers(examples, moved)
    found = kind.metrics([kind.answer_of(one) for one in examples], answers)
    assert found["micro_f1"] == pytest.approx(plain["micro_f1_at_thresholds"])
    assert found["macro_f1"] == pytest.approx(plain["macro_f1_at_thresholds"])
    # Each row by what the rows of the other half say.
    own = best_thresholds(right[1::2], applying[1::2])
    np.testing.assert_array_equal(
        kind.applying(moved)[::2] >= kind.thresholds, applying[::2] >= own
    )


def test_few_rows_of_a_label_choose_no_threshold():
    right = np.zeros((40, 2), dtype=bool)
    right[:4, 0], right[:5, 1] = True, True
    applying = np.where(right, 0.3, 0.1)
    np.testing.assert_allclose(chosen_thresholds(right, applying), [0.5, 0.2])
    np.testing.assert_allclose(best_thresholds(right, applying), [0.2, 0.2])


@pytest.mark.parametrize("options", [{}, {"test_size": 20, "task_options": {"thresholds": 0.4}}])
def test_nothing_is_decided_without_rows_for_it_or_where_somebody_has_said_it(tmp_path, options):
    result, _ = trained(tmp_path, **options)
    saved = json.loads((result.output_dir / "task.json").read_text())["options"]
    assert saved["thresholds"] == options.get("task_options", {}).get("thresholds")
    assert "decided" not in json.loads((result.output_dir / "metrics.json").read_text())
