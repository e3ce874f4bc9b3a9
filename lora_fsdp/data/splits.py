"""Splitting a table into training and test rows: seeded, stratified, no text on both sides.

scikit-learn has no splitter for this: `StratifiedShuffleSplit` knows no groups and refuses labels
with a single row, `GroupShuffleSplit` knows no labels, `StratifiedGroupKFold` makes equal folds.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lora_fsdp.errors import ArgumentError, ColumnNotFoundError, SplitError
from lora_fsdp.tasks.cells import cell_text, label_text


def split_table(
    table: pd.DataFrame,
    *,
    text_column: str | None,
    label_column: str | None,
    test_size: float,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Splits `table` into training and test rows, each in their original order.

    Every label has its share of the test rows, to within a row or so; a label too rare for that
    stays in the training rows. Rows with the same text (surrounding space aside) stay together,
    or the test would ask for what was learnt by heart.

    Args:
        table: the rows.
        text_column: rows equal in it stay together; `None` = every row stands for itself.
        label_column: what to stratify by; `None` = a plain random split.
        test_size: share of the rows if below 1, otherwise their number. It is met exactly, unless
            texts that occur in many rows stand in the way.
        seed: the same seed gives the same split.

    Returns:
        Training rows and test rows.

    Raises:
        ArgumentError: `test_size` is not a share or a number of rows.
        ColumnNotFoundError: a column is not in the table.
        SplitError: there are too few rows, or too few different texts.
    """
    wanted = _test_rows(len(table), test_size)
    for column in (text_column, label_column):
        if column is not None and column not in table.columns:
            there = ", ".join(map(repr, table.columns))
            raise ColumnNotFoundError(f"No column {column!r} to split by; there are {there}.")
    groups = _group_numbers(table, text_column)
    labels = np.zeros(len(table))
    if label_column is not None:
        labels = np.array(list(map(label_text, table[label_column])), dtype=object)
    in_test = np.isin(groups, _test_groups(groups, labels, wanted=wanted, seed=seed))
    return table[~in_test], table[in_test]


def _test_rows(rows: int, test_size: float) -> int:
    if not test_size > 0 or (test_size >= 1 and not float(test_size).is_integer()):
        raise ArgumentError(
            f"test_size={test_size}: give a share between 0 and 1, or a whole number of rows."
        )
    wanted = int(test_size) if test_size >= 1 else max(1, round(rows * test_size))
    if wanted >= rows:
        raise SplitError(
            f"test_size={test_size} asks for {wanted} test rows, but the table has {rows} rows and "
            "some must be left to train on. Give more rows or a smaller test_size (--eval_size)."
        )
    return wanted


def _group_numbers(table: pd.DataFrame, text_column: str | None) -> np.ndarray:
    """For each row the number of its group, [rows]; equal texts share one."""
    if text_column is None:
        return np.arange(len(table))
    stripped = [cell_text(cell).strip() for cell in table[text_column]]
    groups, texts = pd.factorize(np.array(stripped, dtype=object), use_na_sentinel=False)
    if len(texts) < 2:
        raise SplitError(
            f"All {len(table)} rows have the same text in column {text_column!r}: they cannot be "
            "split. Is it the right column?"
        )
    return groups


def _test_groups(groups: np.ndarray, labels: np.ndarray, *, wanted: int, seed: int) -> list[int]:
    """The groups that make up the test rows: `wanted` rows, or as near as whole groups come.

    Systematic sampling: every label's groups, shuffled, are spread evenly from 0 to 1; the groups
    up to a mark then hold the same share of every label.
    """
    rows = pd.DataFrame({"group": groups, "label": labels}).groupby("group", sort=False)
    table = rows.agg(size=("label", "size"), label=("label", "first"))
    table = table.iloc[np.random.default_rng(seed).permutation(len(table))]
    sizes = table.groupby("label", sort=False, dropna=False)["size"]
    place = (sizes.cumsum() - table["size"] / 2) / sizes.transform("sum")
    # A label's last group is also the last to go: no label should be in the test rows alone.
    place = place.where(table.duplicated("label", keep="last"), 1.0)
    order = table["size"].loc[place.sort_values(kind="stable").index]

    chosen: list[int] = []
    missing = wanted
    for group, size in order.items():
        if size <= missing:
            chosen.append(group)
            missing -= size
    rest = order.drop(chosen)
    # One more group, the smallest, if that comes nearer, or if there would be no test row at all.
    if missing > 0 and len(rest) > 1 and (not chosen or rest.min() < 2 * missing):
        chosen.append(rest.idxmin())
    return chosen
