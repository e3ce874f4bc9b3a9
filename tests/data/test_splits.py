"""Training and test rows. Run: python -m pytest tests/data/test_splits.py"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fsdp.data.splits import split_table
from lora_fsdp.errors import ArgumentError, ColumnNotFoundError, SplitError


def split(
    table: pd.DataFrame,
    *,
    test_size: float,
    seed: int = 0,
    text_column: str | None = "text",
    label_column: str | None = "label",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    return split_table(
        table, text_column=text_column, label_column=label_column, test_size=test_size, seed=seed
    )


def table_of(rows: Sequence[tuple[str, str | None]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["text", "label"], index=range(1, len(rows) + 1))


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    """Some texts occur twice (once with space around), some labels once, some rows have neither."""
    labels = st.one_of(st.sampled_from(["a", "a", "a", "b", "c"]), st.integers().map(str))
    kinds = draw(st.lists(st.tuples(labels, st.booleans()), min_size=4, max_size=60))
    rows: list[tuple[str, str | None]] = []
    for number, (label, twice) in enumerate(kinds):
        rows += [(f"text {number}", label), (f" text {number}\n", label)][: 2 if twice else 1]
    return table_of(draw(st.permutations(rows)))


@settings(max_examples=100, deadline=None)
@given(table=tables(), share=st.floats(0.05, 0.7), seed=st.integers(0, 2**31))
def test_split_keeps_its_promises(table: pd.DataFrame, share: float, seed: int) -> None:
    train, test = split(table, test_size=share, seed=seed)
    again_train, again_test = split(table, test_size=share, seed=seed)
    assert train.equals(again_train)
    assert test.equals(again_test)
    # Every row on one side, in order.
    assert sorted([*train.index, *test.index]) == list(table.index)
    assert train.index.is_monotonic_increasing
    assert test.index.is_monotonic_increasing
    # No text on both sides.
    assert not set(train["text"].str.strip()) & set(test["text"].str.strip())
    # The size asked for: texts occur at most twice here, so it is missed by a row at most.
    assert len(train) > 0
    assert len(test) > 0
    assert abs(len(test) - max(1, round(share * len(table)))) <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.1, 0.25, 0.5]))
def test_every_label_has_its_share(seed: int, share: float) -> None:
    sizes = {"often": 600, "sometimes": 80, "seldom": 20, "once": 1}
    labels = [label for label, size in sizes.items() for _ in range(size)]
    table = table_of([(f"text {number}", label) for number, label in enumerate(labels)])
    train, test = split(table, test_size=share, seed=seed)
    for label, size in sizes.items():
        assert abs((test["label"] == label).sum() - share * size) <= 1
    # What occurs once is learnt rather than tested.
    assert "once" in set(train["label"])


def test_tests_are_not_made_of_labels_never_trained() -> None:
    rows = [(f"text {number}", f"label {number // 2}") for number in range(40)]
    train, test = split(table_of(rows), test_size=0.5)
    assert len(test) == 20
    assert set(test["label"]) <= set(train["label"])


def test_seeds_differ() -> None:
    table = table_of([(str(number), "ab"[number % 2]) for number in range(100)])
    assert not split(table, test_size=10, seed=1)[1].equals(split(table, test_size=10, seed=2)[1])


def test_number_of_rows_is_met_exactly_without_duplicates() -> None:
    table = table_of([(str(number), "abc"[number % 3]) for number in range(97)])
    assert len(split(table, test_size=31)[1]) == 31
    assert len(split(table, test_size=1)[1]) == 1


def test_columns_are_optional() -> None:
    table = table_of([("same", None)] * 10)
    train, test = split(table, test_size=0.3, text_column=None, label_column=None)
    assert (len(train), len(test)) == (7, 3)


def test_missing_labels_are_a_label_of_their_own() -> None:
    table = table_of([(str(number), "a" if number % 2 else None) for number in range(40)])
    _, test = split(table, test_size=0.5)
    assert test["label"].isna().sum() == 10


def test_text_that_is_most_of_the_table() -> None:
    table = table_of([("again", "a")] * 90 + [("other", "b")] * 10)
    train, test = split(table, test_size=0.2)
    assert (len(train), len(test)) == (90, 10)
    train, test = split(table, test_size=0.02)
    assert (len(train), len(test)) == (90, 10)


def test_too_few_rows_name_the_numbers() -> None:
    table = table_of([("x", "a"), ("y", "b")])
    with pytest.raises(SplitError, match=r"test_size=5 asks for 5 test rows.* has 2 rows"):
        split(table, test_size=5)
    with pytest.raises(SplitError, match=r"test_size=0\.1 asks for 1 test rows.* has 1 rows"):
        split(table[:1], test_size=0.1)
    with pytest.raises(SplitError, match="All 10 rows have the same text in column 'text'"):
        split(table_of([("x", "a"), (" x ", "b")] * 5), test_size=0.1)


@pytest.mark.parametrize("test_size", [0, -0.1, 1.5, float("nan"), float("inf")])
def test_senseless_sizes(test_size: float) -> None:
    with pytest.raises(ArgumentError, match="share between 0 and 1"):
        split(table_of([("x", "a"), ("y", "b")]), test_size=test_size)


def test_missing_column_names_those_there() -> None:
    with pytest.raises(ColumnNotFoundError, match=r"No column 'body'.*'text', 'label'"):
        split(table_of([("x", "a"), ("y", "b")]), test_size=1, text_column="body")
