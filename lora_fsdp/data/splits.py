"""Training, validation and test rows: as the user has divided them, or split here.

A split is seeded and stratified, with no text on both sides.

scikit-learn has no splitter for this: `StratifiedShuffleSplit` knows no groups and refuses labels
with a single row, `GroupShuffleSplit` knows no labels, `StratifiedGroupKFold` makes equal folds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lora_fsdp.errors import ArgumentError, ColumnNotFoundError, SplitError
from lora_fsdp.tasks.cells import cell_text, label_text

TRAIN, VALIDATION, TEST = "train", "validation", "test"
# As `datasets` takes file names (`datasets.data_files.SPLIT_KEYWORDS`), and one more.
SPLIT_NAMES = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev", "development"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
# Fewer rows give no verdict.
LEAST_TEST_ROWS = 30
# What `save_to_disk` writes into a folder of splits, and into that of one.
_DICT_FILE, _DATASET_FILE = "dataset_dict.json", "state.json"
_NO_TABLES = (".md", ".py", ".yaml", ".yml", ".toml", ".lock", "")


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


@dataclass(frozen=True)
class Parts:
    """Tables by what they are for; `None` = not given.

    Attributes:
        train: to train on.
        validation: to evaluate on while training.
        test: for the report alone.
        said: where they come from, a line each.
    """

    train: pd.DataFrame
    validation: pd.DataFrame | None = None
    test: pd.DataFrame | None = None
    said: tuple[str, ...] = ()


def split_of(value: object) -> str | None:
    """ "train", "validation" or "test" by one of the names that `datasets` and the Hub know."""
    name = label_text(value).casefold()
    return next((split for split, names in SPLIT_NAMES.items() if name in names), None)


def find_split_column(table: pd.DataFrame, *, besides: Sequence[str | None]) -> str | None:
    """The column that plainly says which split each row is of, or `None`.

    Every cell must name a split, and the table must have rows to train on and others.

    Args:
        table: the rows.
        besides: columns that say something else, such as the label.
    """
    for name in table.columns:
        if name not in besides and all(isinstance(cell, str) for cell in table[name]):
            splits = set(map(split_of, table[name]))
            if None not in splits and TRAIN in splits and len(splits) > 1:
                return str(name)
    return None


def divide_by_column(table: pd.DataFrame, column: str, *, whole: pd.DataFrame) -> Parts:
    """The rows by what `column` says of them.

    Args:
        table: the rows that are used.
        column: its name.
        whole: the table that they are of.

    Raises:
        ColumnNotFoundError: there is no such column.
        SplitError: a cell names no split, or there are no rows to train on, or of a split of the
            whole table none is used.
    """
    if column not in table.columns:
        there = ", ".join(map(repr, table.columns))
        raise ColumnNotFoundError(f"No column {column!r} for --split_column; there are {there}.")
    found = pd.Series(list(map(split_of, table[column])), table.index, dtype=object)
    for number, cell in table[column][found.isna()].head(1).items():
        known = ", ".join(names[0] for names in SPLIT_NAMES.values())
        raise SplitError(
            f"Row {number}: column {column!r} holds {cell_text(cell)[:80]!r}, which names no "
            f"split. Write one of {known}, or name another --split_column (none = no column)."
        )
    parts = {split: table[found == split] for split in SPLIT_NAMES}
    given = set(map(split_of, whole[column]))
    for split in SPLIT_NAMES:
        if split in given and parts[split].empty:
            raise SplitError(
                f"None of the {len(table)} rows that are used is of the split {split!r}, which "
                f"column {column!r} of the whole table has: take more rows (--max_rows, --head)."
            )
    if parts[TRAIN].empty:
        raise SplitError(f"Column {column!r} says of no row that it is to train on ('train').")
    counts = ", ".join(f"{len(part)} {split}" for split, part in parts.items() if len(part))
    return Parts(
        parts[TRAIN],
        parts[VALIDATION] if len(parts[VALIDATION]) else None,
        parts[TEST] if len(parts[TEST]) else None,
        said=(f"column {column!r} divides the rows: {counts}",),
    )


def complete_parts(
    parts: Parts,
    *,
    columns: tuple[str | None, str | None],
    eval_size: float,
    test_size: float | None,
    choosing: bool,
    seed: int,
) -> Parts:
    """`parts` with held-out rows, and with rows for a test where something is chosen.

    What the user has divided is never divided again. Where nothing is chosen by the held-out rows,
    one set of them is enough, be it called validation or test.

    Args:
        parts: what was named.
        columns: by which to split (`Task.split_columns`).
        eval_size, test_size: shares of the rows, or their numbers; `None` = a test only if it is
            needed, 0 = none.
        choosing: whether something, such as the best checkpoint, is chosen by the held-out rows.
        seed: of the splits.

    Returns:
        Parts with `validation`; `test` is `None` where `validation` is also what is reported.

    Raises:
        ArgumentError: a test is named twice.
        SplitError: as `split_table`.
    """
    text_column, label_column = columns

    def split(table: pd.DataFrame, size: float) -> tuple[pd.DataFrame, pd.DataFrame]:
        return split_table(
            table, text_column=text_column, label_column=label_column, test_size=size, seed=seed
        )

    train, validation, test, said = parts.train, parts.validation, parts.test, list(parts.said)
    rows, is_own = len(train), validation is not None
    if test is not None and test_size:
        raise ArgumentError(
            f"--test_size {test_size:g} would split off a test, but test rows are named already: "
            "leave it out."
        )
    if validation is None and test is not None and not choosing:
        said.append(f"the {len(test)} test rows are the only ones held out: nothing is chosen")
        return Parts(train, test, None, tuple(said))
    if validation is None:
        train, validation = split(train, eval_size)
        said.append(f"{len(validation)} of {rows} rows are held out at random (seed {seed})")
    if test_size:
        train, test = split(train, _test_rows(rows, test_size))
        said.append(f"{len(test)} of {rows} rows are kept for the test (seed {seed})")
    elif test is None and test_size is None and choosing and not is_own:
        halves = _halves(validation, split)
        if halves is not None:
            validation, test = halves
            said.append(
                f"the checkpoint is chosen on {len(validation)} of them, and {len(test)} are kept "
                "for the test (--test_size 0 = choose and report on the same rows)"
            )
    return Parts(train, validation, test, tuple(said))


def _halves(
    table: pd.DataFrame,
    split: Callable[[pd.DataFrame, float], tuple[pd.DataFrame, pd.DataFrame]],
) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Two halves, each enough for a verdict, or `None`."""
    if len(table) < 2 * LEAST_TEST_ROWS:
        return None
    try:
        halves = split(table, 0.5)
    except SplitError:  # all of one text
        return None
    return halves if min(map(len, halves)) >= LEAST_TEST_ROWS else None


def files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder whose names say which split they are of; {} if it is no such folder.

    A `DatasetDict` that was saved (a folder a split), or the layout of a dataset on the Hub
    (`train.csv` and `test.csv`, `data/train-00000-of-00001.parquet`, `train/part.jsonl`).

    Source: https://huggingface.co/docs/datasets/repository_structure
    """
    if (folder / _DICT_FILE).is_file():
        return _saved_splits(folder)
    if not folder.is_dir() or (folder / _DATASET_FILE).is_file():
        return {}
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    base = str(folder.absolute())
    try:
        patterns = get_data_patterns(base)
    except EmptyDatasetError:
        return {}
    files: dict[str, list[Path]] = {}
    for name, globs in patterns.items():
        found: set[Path] = set()
        for glob in globs:  # each may find nothing; one of them does not
            with suppress(FileNotFoundError):
                found |= {Path(str(file)) for file in resolve_pattern(glob, base)}
        tables = sorted(file for file in found if file.suffix.lower() not in _NO_TABLES)
        split = split_of(name)
        if tables and split is not None and "**" not in globs:
            files[split] = [*files.get(split, []), *tables]
    return files if TRAIN in files else {}


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
    try:
        names = json.loads((folder / _DICT_FILE).read_text(encoding="utf-8"))["splits"]
        splits = {name: split_of(name) for name in names}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}  # what is wrong with it, reading it says
    if TRAIN not in splits.values():
        return {}
    return {split: [folder / name] for name, split in splits.items() if split is not None}
