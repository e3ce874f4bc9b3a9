"""Several labels at once: cells, thresholds, metrics and what cannot be one.

Run: python -m pytest tests/tasks/test_multilabel.py
"""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from lora_fsdp.errors import ArgumentError, MalformedRowError, SingleLabelError
from lora_fsdp.tasks import MultilabelTask
from lora_fsdp.tasks.answers.classic import outputs_of
from lora_fsdp.tasks.answers.several_labels import best_thresholds, labels_in

TOPICS = ("crew", "luggage", "price")


def table_of(*cells) -> pd.DataFrame:
    texts = [f"text {number}" for number in range(len(cells))]
    index = pd.RangeIndex(1, len(cells) + 1)
    return pd.DataFrame({"text": texts, "labels": pd.Series(cells, index, dtype=object)})


def test_labels_are_read_from_every_form_of_cell() -> None:
    table = table_of("price; crew", '["crew", "luggage"]', ["price"], "none", "[]", [], "crew;")
    task = MultilabelTask().bind(table)
    assert task.labels == TOPICS
    examples = task.examples(table)
    assert [one.target for one in examples] == [
        "crew; price", "crew; luggage", "price", "none", "none", "none", "crew",
    ]  # fmt: skip
    assert examples[0].shares == (1, 0, 0, 1, 1, 0)
    kind = task.answer_kind
    assert list(zip(kind.contexts(examples[0]), kind.candidates(examples[0]), strict=True))[:3] == [
        ("crew:", " yes"), ("crew:", " no"), ("luggage:", " yes"),
    ]  # fmt: skip
    assert MultilabelTask(**task.options()).labels == TOPICS
    commas = MultilabelTask(separator=",").bind(table_of("a b,c", "c"))
    assert commas.labels == ("a b", "c")


def random_rows(rows: int = 60):
    generator = np.random.default_rng(1)
    right = generator.random((rows, 3)) < [0.5, 0.2, 0.1]
    cells = [";".join(np.array(TOPICS)[row]) or "none" for row in right]
    task = MultilabelTask(labels=TOPICS).bind(table_of(*cells))
    applying = np.clip(right * 0.3 + generator.random((rows, 3)) * 0.6, 0.01, 0.99)
    outputs = outputs_of(np.stack([applying, 1 - applying], axis=2).reshape(rows, 6))
    return task, task.examples(table_of(*cells)), outputs, right, applying


def test_metrics_are_those_of_scikit_learn() -> None:
    task, examples, outputs, right, applying = random_rows()
    kind = task.answer_kind
    np.testing.assert_allclose(kind.applying(outputs), applying, rtol=1e-5)
    given, answers = applying >= 0.5, kind.answers(examples, outputs)
    assert [labels_in(answer) for answer in answers] == [set(np.array(TOPICS)[r]) for r in given]
    found = task.measure(examples, answers)
    assert found["micro_f1"] == pytest.approx(f1_score(right, given, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(right, given, average="macro"))
    assert found["subset_accuracy"] == pytest.approx(accuracy_score(right, given))
    by_label = [found[f"f1/{topic}"] for topic in TOPICS]
    assert by_label == pytest.approx(f1_score(right, given, average=None).tolist())
    assert kind.probabilities(outputs) == pytest.approx(
        np.maximum(applying, 1 - applying).prod(axis=1).tolist(), rel=1e-5
    )
    weights = kind.row_weights("micro_f1", examples, outputs)
    rows = kind.row_scores("micro_f1", examples, outputs)
    assert np.average(rows, weights=weights) == pytest.approx(found["micro_f1"])
    assert np.mean(kind.row_scores("subset_accuracy", examples, outputs)) == pytest.approx(
        found["subset_accuracy"]
    )


def test_a_threshold_is_the_best_and_chosen_by_other_rows() -> None:
    task, examples, outputs, right, applying = random_rows()
    thresholds = best_thresholds(right, applying)
    for place, threshold in enumerate(thresholds):
        best = max(
            f1_score(right[:, place], applying[:, place] >= tried, zero_division=0)
            for tried in np.linspace(0, 1, 501)
        )
        found = f1_score(right[:, place], applying[:, place] >= threshold)
        assert found == pytest.approx(best)
    assert best_thresholds(np.zeros((4, 1), bool), np.ones((4, 1))).tolist() == [0.5]
    given = np.zeros_like(right)
    given[::2] = applying[::2] >= best_thresholds(right[1::2], applying[1::2])
    given[1::2] = applying[1::2] >= best_thresholds(right[::2], applying[::2])
    found = task.answer_kind.metrics_of_outputs(examples, outputs)
    expected = f1_score(right, given, average="micro")
    assert found["micro_f1_at_thresholds"] == pytest.approx(expected)
    alone = task.answer_kind.metrics_of_outputs(examples[:1], outputs.of([0]))
    assert set(alone) == {"micro_f1_at_thresholds", "macro_f1_at_thresholds"}


def test_thresholds_decide_the_answers() -> None:
    _, examples, outputs, _, applying = random_rows()
    task = MultilabelTask(labels=TOPICS, thresholds={"price": 0.2})
    answers = task.answer_kind.answers(examples, outputs)
    assert ["price" in labels_in(one) for one in answers] == (applying[:, 2] >= 0.2).tolist()
    for thresholds in (1.5, {"price": "often"}, {"prize": 0.2}, float("nan"), True):
        with pytest.raises(ArgumentError, match="thresholds"):
            MultilabelTask(labels=TOPICS, thresholds=thresholds)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("", r"row 2 \(nothing in column 'labels'; where no label applies, write none\)"),
        (";", "row 2 .*write none"),
        (None, "row 2 .*write none"),
        ("crew;none", "row 2 .*'none' cannot be a label beside others"),
        (["a;b"], "row 2 .*'a;b' cannot be a label"),
        ("crew;crew", "row 2 .*names a label twice"),
        ({"crew": 1}, "row 2 .*an object, no labels"),
    ],
)
def test_a_cell_that_says_nothing_of_labels_is_named(cell, message) -> None:
    table = table_of("crew", cell, "price")
    with pytest.raises(MalformedRowError, match=message):
        MultilabelTask().bind(table)
    assert MultilabelTask().drop_bad_rows(table)[1] == 1


def test_an_unknown_label_and_a_label_set_that_is_none() -> None:
    with pytest.raises(MalformedRowError, match=r"row 2 \(column 'labels': 'wifi' is none of"):
        MultilabelTask(labels=TOPICS).bind(table_of("crew", "price; wifi"))
    with pytest.raises(SingleLabelError, match="No row has a label in column 'labels'"):
        MultilabelTask().bind(table_of("none", "[]"))
    for labels in ([], ["a", "a"], ["none"], ["a;b"], ["a", ""], "crew"):
        with pytest.raises(ArgumentError, match="labels"):
            MultilabelTask(labels=labels)
