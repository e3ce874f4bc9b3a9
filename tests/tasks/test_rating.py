"""Scores on a scale: levels, metrics and what cannot be one.

Run: python -m pytest tests/tasks/test_rating.py
"""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from lora_fsdp.errors import ArgumentError, MalformedRowError, UnknownLabelError
from lora_fsdp.tasks import RatingTask
from lora_fsdp.tasks.answers.classic import outputs_of
from lora_fsdp.tasks.weights import weighted


def table_of(*scores) -> pd.DataFrame:
    texts = [f"text {number}" for number in range(len(scores))]
    index = pd.RangeIndex(1, len(scores) + 1)
    return pd.DataFrame({"text": texts, "rating": scores}, index=index)


def test_levels_are_numbers_in_their_order_and_one_spelling() -> None:
    table = table_of("10", "2", "2.0", "-1.50", 0.5)
    task = RatingTask().bind(table)
    assert task.labels == ("-1.5", "0.5", "2", "10")
    examples = task.examples(table)
    assert [one.target for one in examples] == [" 10", " 2", " 2", " -1.5", " 0.5"]
    assert RatingTask(**task.options()).labels == task.labels
    assert RatingTask(labels=["5", "1.0", "3"]).bind(table_of("1", "3")).labels == ("1", "3", "5")


def test_metrics_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    levels = ["1", "2", "3", "4", "5"]
    task = RatingTask(labels=levels).bind(table_of(*generator.choice(levels, 40)))
    examples = task.examples(table_of(*generator.choice(levels, 40)))
    kind, outputs = task.answer_kind, outputs_of(generator.dirichlet(np.ones(5), 40))
    right = np.array([float(kind.answer_of(example)) for example in examples])
    answers = kind.answers(examples, outputs)
    given, expected = np.array(answers, dtype=float), outputs.probabilities @ np.arange(1, 6.0)
    np.testing.assert_allclose(given, np.clip(np.round(expected), 1, 5))
    found = kind.metrics_of_outputs(examples, outputs) | task.measure(examples, answers)
    cumulated = outputs.probabilities.cumsum(axis=1)[:, :4]
    ranked = np.square(cumulated - (np.arange(1, 5) >= right[:, None])).sum(axis=1)
    assert found == pytest.approx(
        {
            "quadratic_kappa": cohen_kappa_score(right, given, weights="quadratic"),
            "accuracy": (right == given).mean(),
            "mean_absolute_error": np.abs(right - given).mean(),
            "root_mean_squared_error": np.sqrt(np.square(right - expected).mean()),
            "spearman": spearmanr(right, expected).statistic,
            "ranked_probability_score": ranked.mean(),
        }
    )
    for metric in ("quadratic_kappa", "mean_absolute_error", "ranked_probability_score"):
        of_rows = kind.row_scores(metric, examples, outputs)
        assert np.mean(of_rows) == pytest.approx(found[metric])
    assert kind.row_scores("spearman", examples, outputs) is None
    chance = kind.chance(examples)
    assert chance["mean_absolute_error"] == pytest.approx(
        np.mean([abs(one - level) for one in right for level in range(1, 6)])
    )


def test_one_level_everywhere_is_no_error() -> None:
    task = RatingTask(labels=["1", "2"])
    metrics = task.compute_metrics(["1", "1"], ["1", "1"])
    assert metrics == {"quadratic_kappa": 1.0, "accuracy": 1.0, "mean_absolute_error": 0.0}
    assert task.compute_metrics(["1", "1"], ["2", None])["quadratic_kappa"] == 0.0
    kind, examples = task.answer_kind, task.bind(table_of(1, 2)).examples(table_of(1, 1))
    assert kind.metrics_of_outputs(examples, outputs_of(np.ones((2, 2)) / 2))["spearman"] == 0


def test_classic_baselines_are_asked_by_the_expected_value_too() -> None:
    rows = pd.DataFrame(
        {"text": ["bad " * 3, "bad room", "good", "good room"] * 5, "rating": [1, 2, 4, 5] * 5}
    )
    task = RatingTask().bind(rows)
    classic = task.answer_kind.classic(task.examples(rows), task.examples(rows))
    answers = {
        name: task.answer_kind.answers(task.examples(rows), outputs)
        for name, outputs in classic.items()
    }
    assert set(answers["average"]) == {"2"}  # the expected value is 3: of two as near, the lower
    found = task.compute_metrics([str(one) for one in rows.rating], answers["TF-IDF + logistic"])
    assert found["quadratic_kappa"] > 0.8


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("4 stars", r"row 2 \(column 'rating' holds '4 stars', no number\)"),
        ("nan", "row 2 .*'nan', no number"),
        ("inf", "row 2 .*'inf', no number"),
        (["1"], "row 2 .*a list, not one label"),
    ],
)
def test_a_level_that_is_no_number_is_named(cell, message) -> None:
    table = table_of("1", cell, "3")
    with pytest.raises(MalformedRowError, match=message):
        RatingTask().bind(table)
    kept, dropped = RatingTask().drop_bad_rows(table)
    assert (list(kept.index), dropped) == ([1, 3], 1)


def test_an_empty_answer_and_a_level_off_the_scale_are_named() -> None:
    with pytest.raises(UnknownLabelError, match=r"column 'rating'.*row 2 \(no label\)"):
        RatingTask().bind(table_of("1", "", "3"))
    with pytest.raises(UnknownLabelError, match=r"row 3 \(label '7'\)"):
        RatingTask(labels=["1", "2", "3"]).bind(table_of("1", "2.0", "7"))
    with pytest.raises(ArgumentError, match="must be numbers, not 'five'"):
        RatingTask(labels=["1", "five"])
    with pytest.raises(ArgumentError, match="none twice"):
        RatingTask(labels=["1", "1.0"])
    with pytest.raises(ArgumentError, match="holds 200 different numbers"):
        RatingTask().bind(table_of(*range(200)))


def test_levels_may_have_weights() -> None:
    table = table_of("1", "2", "2")
    task = RatingTask().bind(table)
    found = weighted(task, task.examples(table), table, column=None, classes=["2=3"])
    assert [one.weight for one in found] == [1, 3, 3]
