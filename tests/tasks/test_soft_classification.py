"""Labels that are right in part: forms of rows, metrics and what is no distribution.

Run: python -m pytest tests/tasks/test_soft_classification.py
"""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import entropy

from lora_fsdp.errors import (
    ArgumentError,
    ColumnNotFoundError,
    MalformedRowError,
    SingleLabelError,
)
from lora_fsdp.tasks import SoftClassificationTask
from lora_fsdp.tasks.answers.classic import outputs_of


def rows_of(**columns) -> pd.DataFrame:
    count = len(next(iter(columns.values())))
    index = pd.RangeIndex(1, count + 1)
    texts = [f"text {number}" for number in range(count)]
    given = {name: pd.Series(cells, index, dtype=object) for name, cells in columns.items()}
    return pd.DataFrame({"text": pd.Series(texts, index), **given})


FORMS = {
    "votes in columns": ({"votes/a": [3, "1"], "votes/b": [1, "0"]}, {}),
    "probabilities in columns": ({"probability/a": ["0.75", 1], "probability/b": [0.25, 0.0]}, {}),
    "columns that are named": (
        {"a": [0.75, 1], "b": [0.25, 0]}, {"share_columns": ["a", "b"]},
    ),
    "votes in columns that are named": (
        {"a": [6, 2], "b": [2, 0]}, {"share_columns": ["a", "b"], "votes": True},
    ),
    "a list of votes": ({"votes": ['["a", "a", "b", "a"]', ["a"]]}, {}),
    "an object": ({"votes": ['{"a": 0.75, "b": 0.25}', {"a": 1, "b": None}]}, {}),
    "votes in an object": ({"votes": ['{"b": 2, "a": 6}', {"a": 4}]}, {"votes": True}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_shares_are_read_from_every_form(form) -> None:
    columns, options = FORMS[form]
    table = rows_of(**columns)
    task = SoftClassificationTask(**options).bind(table)
    assert task.labels == ("a", "b")
    examples = task.examples(table)
    assert [one.shares for one in examples] == [(0.75, 0.25), (1, 0)]
    assert [one.target for one in examples] == [" a", " a"]
    again = SoftClassificationTask(**{k: v for k, v in task.options().items() if v is not None})
    asked = again.bind(table[["text"]], with_labels=False)
    assert asked.answer_kind.labels == ("a", "b")
    assert again.bind(table, for_training=False).examples(table) == examples


def test_rounded_probabilities_are_taken_as_they_are_meant() -> None:
    table = rows_of(**{f"probability/{label}": [0.33] for label in "abc"})
    [example] = SoftClassificationTask().bind(table).examples(table)
    assert example.shares == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert sum(example.shares) == pytest.approx(1, abs=1e-12)


def test_metrics_are_the_textbooks() -> None:
    generator = np.random.default_rng(0)
    shares, given = generator.dirichlet(np.ones(3), 30), generator.dirichlet(np.ones(3), 30)
    shares[0] = [1, 0, 0]
    table = rows_of(**{f"probability/{n}": shares[:, k].tolist() for k, n in enumerate("abc")})
    task = SoftClassificationTask().bind(table)
    examples, outputs = task.examples(table), outputs_of(given)
    kind = task.answer_kind
    found = kind.metrics_of_outputs(examples, outputs) | task.measure(
        examples, kind.answers(examples, outputs)
    )
    assert found == pytest.approx(
        {
            "overlap": (1 - np.abs(shares - given).sum(axis=1) / 2).mean(),
            "brier_score": np.square(shares - given).sum(axis=1).mean(),
            "kl_divergence": np.mean([entropy(q, p) for q, p in zip(shares, given, strict=True)]),
            "accuracy": (shares.argmax(axis=1) == given.argmax(axis=1)).mean(),
        },
        rel=1e-5,
    )
    for metric in ("overlap", "brier_score", "kl_divergence"):
        assert np.mean(kind.row_scores(metric, examples, outputs)) == pytest.approx(found[metric])
    evenly = outputs_of(np.full((30, 3), 1 / 3))
    chance = kind.chance(examples)
    assert {**kind.metrics_of_outputs(examples, evenly), "accuracy": 1 / 3} == pytest.approx(chance)
    assert kind.run_columns(examples, outputs)["share/b"] == pytest.approx(shares[:, 1].tolist())
    average = kind.classic(examples, examples)["average"].probabilities
    np.testing.assert_allclose(average, np.tile(shares.mean(axis=0), (30, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"probability/a": [0.5, 0.5], "probability/b": [0.5, 0.4]},
         r"row 2 \(columns 'probability/a', 'probability/b': the probabilities sum to 0.9, and"),
        ({"probability/a": [0.5, 1.5], "probability/b": [0.5, -0.5]}, "row 2 .*'b' has '-0.5',"),
        ({"probability/a": [0.5, "x"], "probability/b": [0.5, 0.5]}, "row 2 .*'a' has 'x', no n"),
        ({"probability/a": [0.5, ""], "probability/b": [0.5, 1]}, "row 2 .*'a' has '', no number"),
        ({"votes/a": [1, 0], "votes/b": [0, "0"]}, "row 2 .*all numbers are 0"),
        ({"votes/a": [1, "nan"], "votes/b": [0, "0"]}, "row 2 .*'a' has 'nan', no number from 0"),
        ({"votes": ['["a", "b"]', ""]}, r"row 2 \(nothing in column 'votes'\)"),
        ({"votes": ['["a", "b"]', []]}, r"row 2 \(nothing in column 'votes'\)"),
        ({"votes": ['["a", "b"]', ["a", ""]]}, "row 2 .*a vote for nothing"),
        ({"votes": ['["a", "b"]', "a"]}, "row 2 .*holds 'a', neither a list of votes nor"),
        ({"votes": ['["a", "b"]', '{"a": 0.2}']}, "row 2 .*sum to 0.2, and not to 1"),
    ],
)  # fmt: skip
def test_what_is_no_distribution_is_named(columns, message) -> None:
    table = rows_of(**columns)
    with pytest.raises(MalformedRowError, match=message):
        SoftClassificationTask().bind(table)
    assert SoftClassificationTask().drop_bad_rows(table)[1] == 1


def test_an_unknown_label_and_columns_that_are_not_there() -> None:
    with pytest.raises(MalformedRowError, match=r"row 1 \(column 'votes': 'c' is none of 'a', 'b'"):
        SoftClassificationTask(labels=["a", "b"]).bind(rows_of(votes=[["a", "c"]]))
    task = SoftClassificationTask(labels=["a", "b"])
    with pytest.raises(ArgumentError, match=r"labels \['a', 'c'\], and not of \['a', 'b'\]"):
        task.bind(rows_of(**{"votes/a": [1], "votes/c": [1]}))
    with pytest.raises(SingleLabelError, match="names 1 label"):
        SoftClassificationTask().bind(rows_of(votes=[["a"], ["a", "a"]]))
    with pytest.raises(ColumnNotFoundError, match="needs 'votes'"):
        SoftClassificationTask().bind(rows_of(label=["a", "b"]))
    with pytest.raises(ArgumentError, match="share_columns must be a list of two or more"):
        SoftClassificationTask(share_columns=["a"])
    with pytest.raises(ArgumentError, match="votes must be true or false"):
        SoftClassificationTask(votes="yes")
