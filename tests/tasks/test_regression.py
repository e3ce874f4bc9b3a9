"""A number for each text: bins, metrics and what is no number.

Run: python -m pytest tests/tasks/test_regression.py
"""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from lora_fsdp.errors import ArgumentError, MalformedRowError, SingleLabelError
from lora_fsdp.tasks import RegressionTask
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.tasks.answers.classic import outputs_of


def table_of(*values) -> pd.DataFrame:
    texts = [f"text {number}" for number in range(len(values))]
    index = pd.RangeIndex(1, len(values) + 1)
    return pd.DataFrame({"text": texts, "value": pd.Series(values, index, dtype=object)})


def test_bins_have_as_many_rows_each_and_short_names() -> None:
    values = np.exp(np.random.default_rng(0).normal(3, 1, 1000))
    table = table_of(*values)
    task = RegressionTask(bins=10).bind(table)
    centres = np.array(task.centres, dtype=float)
    assert len(centres) == 10
    assert max(map(len, task.centres)) <= 5
    np.testing.assert_allclose(centres, np.quantile(values, np.linspace(0, 1, 10)), rtol=0.03)
    assert RegressionTask(**task.options()).centres == task.centres
    few = RegressionTask().bind(table_of("3", "1.50", 3.0, "1e3"))
    assert few.centres == ("1.5", "3", "1000")
    alone = task.bind(table[["text"]], with_labels=False)
    assert alone.answer_kind.centres == task.centres


def test_the_mean_of_a_numbers_shares_is_the_number() -> None:
    kind = RegressionTask(centres=[0, 1, 4, 10]).answer_kind
    for number in (0, 0.25, 1, 3.5, 4, 9.9, 10):
        shares = kind.share(number)
        assert sum(shares) == pytest.approx(1)
        assert np.dot(shares, kind.values) == pytest.approx(number)
        assert sum(share > 0 for share in shares) <= 2
    assert kind.share(-5) == (1, 0, 0, 0)
    assert kind.share(99) == (0, 0, 0, 1)


def test_metrics_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0, 5, 40).tolist()
    task = RegressionTask(bins=6).bind(table_of(*values))
    examples, kind = task.examples(table_of(*values)), task.answer_kind
    outputs = outputs_of(generator.dirichlet(np.ones(6), 40))
    answers = kind.answers(examples, outputs)
    given = outputs.probabilities @ kind.values
    np.testing.assert_allclose(np.array(answers, dtype=float), given, rtol=1e-5)
    found = task.measure(examples, answers)
    assert found["r2"] == pytest.approx(r2_score(values, given), rel=1e-4)
    assert found["mean_absolute_error"] == pytest.approx(
        mean_absolute_error(values, given), rel=1e-4
    )
    assert found["root_mean_squared_error"] == pytest.approx(
        root_mean_squared_error(values, given), rel=1e-4
    )
    for metric in ("r2", "mean_absolute_error"):
        rows = kind.row_scores(metric, examples, outputs)
        assert np.mean(rows) == pytest.approx(found[metric])
    assert task.compute_metrics(["1", "1"], ["1", None])["r2"] == 0.0
    nothing = ModelOutputs(np.zeros((0, 0)), np.zeros((0, 0)))
    assert list(kind.predicted_columns([], nothing)) == ["predicted_number", "spread"]


def test_classic_baselines() -> None:
    rows = pd.DataFrame(
        {
            "text": ["old lamp", "old chair", "new bike", "new car"] * 5,
            "value": [5, 7, 300, 320] * 5,
        }
    )
    task = RegressionTask().bind(rows)
    examples, kind = task.examples(rows), task.answer_kind
    r2 = {
        name: task.measure(examples, kind.answers(examples, given))["r2"]
        for name, given in kind.classic(examples, examples).items()
    }
    assert r2["average"] == pytest.approx(0, abs=1e-3)
    assert r2["TF-IDF + logistic"] > 0.8


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("12 euros", r"row 2 \(column 'value' holds '12 euros', no number\)"),
        ("nan", "row 2 .*'nan', no number"),
        ("inf", "row 2 .*'inf', no number"),
        ("", r"row 2 \(nothing in column 'value'\)"),
        ([1], "row 2 .*no number"),
    ],
)
def test_a_cell_that_is_no_number_is_named(cell, message) -> None:
    table = table_of("1", cell, "3")
    with pytest.raises(MalformedRowError, match=message):
        RegressionTask().bind(table)
    assert RegressionTask().drop_bad_rows(table)[1] == 1


def test_options_that_are_none() -> None:
    with pytest.raises(SingleLabelError, match="All 2 rows have the number 4 in column 'value'"):
        RegressionTask().bind(table_of(4, "4.0"))
    for bins in (1, 1000, "5", 2.5, True):
        with pytest.raises(ArgumentError, match="bins must be a whole number"):
            RegressionTask(bins=bins)
    for centres in ([1], [1, 1], ["a", "b"], "12", [1, float("nan")]):
        with pytest.raises(ArgumentError, match="centres must be a list"):
            RegressionTask(centres=centres)
