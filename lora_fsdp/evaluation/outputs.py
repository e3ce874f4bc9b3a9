"""The plain outputs of a run: tables for the terminal, a picture, JSON."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_fsdp.printing import visible

# The systems of a comparison beside the baselines, as they are called in `metrics.json` and tables.
UNTRAINED, TUNED, CHANCE = "untrained", "tuned", "chance"
# A baseline that the base itself gives.
PROBE = "frozen probe"
# Metrics that end a table, and those of a closed set that its confusion matrix shows better.
_SHOWN_LAST = ("accuracy", "macro_f1", "exact_match", "loss")
_NOT_SHOWN = ("weighted_f1", "precision/", "recall/", "f1/")
# The log of a run, a line an entry.
LOG_FILE = "log_history.jsonl"

_NOTHING = "—"
_MOST_LABELS_WITH_COUNTS = 25
_LONGEST_NAME_IN_PICTURE = 30


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """One row of the table of predictions; `None` = there is none.

    Attributes:
        row: number of the row in its table.
        text: the text that was classified.
        target: the right answer.
        base: the answer of the model before training.
        tuned: the answer of the model after training.
        probability: of the tuned model's answer, 0 to 1.
    """

    row: int
    text: str
    target: str | None
    base: str | None
    tuned: str | None
    probability: float | None


def shown_metrics(metrics: Iterable[str], *, primary: str) -> list[str]:
    """Of a system's metrics those that a table shows, in their order: the primary one first."""
    given = list(metrics)
    own = [name for name in given if not name.startswith(_NOT_SHOWN) and name not in _SHOWN_LAST]
    return [name for name in dict.fromkeys([primary, *own, *_SHOWN_LAST]) if name in given]


def format_metrics_table(
    columns: Mapping[str, Mapping[str, float]], keys: Sequence[str], *, width: int = 100
) -> str:
    """Metrics side by side, as plain text.

    Args:
        columns: for each heading (a model, a baseline) its metrics.
        keys: the metrics to show, a line each; one that a column lacks is shown as a dash.
        width: characters a line, at most.
    """
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for heading in columns:
        table.add_column(Text(visible(heading, lines=False)), justify="right")
    for key in keys:
        values = (metrics.get(key) for metrics in columns.values())
        table.add_row(Text(visible(key, lines=False)), *map(_number, values))
    return _plain_text(table, width)


def format_predictions_table(rows: Sequence[PredictionRow], *, width: int = 100) -> str:
    """Predictions beside the truth, a line each, as plain text.

    The text is shortened to make a line fit into `width` characters, and of an answer of many words
    the beginning is shown; line breaks and control characters are shown as escapes.
    """
    table = Table(box=box.SIMPLE_HEAD, expand=True)
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for heading in ("true", "base", "tuned"):
        table.add_column(heading, no_wrap=True)
    table.add_column("prob.", justify="right", no_wrap=True)
    for row in rows:
        answers = [answer or _NOTHING for answer in (row.target, row.base, row.tuned)]
        shown = [_cut(answer, longest=max(12, width * 22 // 100)) for answer in answers]
        cells = [Text(visible(cell, lines=False)) for cell in (row.text, *shown)]
        table.add_row(str(row.row), *cells, _number(row.probability))
    return _plain_text(table, width)


def save_confusion_matrix_png(matrix: pd.DataFrame, path: str | Path) -> None:
    """Draws a confusion matrix: counts in the cells, coloured by their share of the row.

    With more than 25 labels the cells are too small for counts, and long names are cut.

    Args:
        matrix: counts [true labels, predicted labels], as `AnswerKind.confusion_matrix`
            returns them.
        path: the PNG file to write; its folder must exist.
    """
    # A Figure without pyplot draws with Agg and leaves the user's pyplot state alone.
    from matplotlib.figure import Figure

    counts = matrix.to_numpy()
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    height, width = counts.shape
    many = width > _MOST_LABELS_WITH_COUNTS
    size, font = ((0.18, 0.18), 6) if many else ((0.6, 0.5), 10)
    names = [
        [_cut(visible(str(name), lines=False)) for name in axis]
        for axis in (matrix.columns, matrix.index)
    ]
    figure = Figure(figsize=(3 + size[0] * width, 2.5 + size[1] * height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    # Without parse_math a label such as "$" would be taken for a formula.
    text: dict[str, Any] = {"parse_math": False, "fontsize": font}
    axes.set_xticks(
        range(width),
        names[0],
        rotation=90 if many else 45,
        ha="center" if many else "right",
        **text,
    )
    axes.set_yticks(range(height), names[1], **text)
    axes.set_xlabel("predicted label")
    axes.set_ylabel("true label")
    for row, column in () if many else np.ndindex(height, width):
        ink = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=ink)
    figure.colorbar(image, ax=axes, label="share of the true label's rows")
    figure.savefig(path, format="png", dpi=120)


def _cut(name: str, *, longest: int = _LONGEST_NAME_IN_PICTURE) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def write_json(path: str | Path, data: object) -> None:
    """Writes `data` as JSON, all or nothing: to a file beside `path` first, which then replaces it.

    NumPy numbers and paths are written as plain numbers and strings.

    Raises:
        TypeError: something in `data` has no JSON form; `path` is left as it was.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=_as_json) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file, all or nothing, with line breaks as they are in `text`."""
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8", newline=""))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Through a file beside `path`, which is on the disk before it gets its name."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _as_json(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as JSON")


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4f}"


def _plain_text(table: Table, width: int) -> str:
    output = io.StringIO()
    # Said outright, so that no environment variable (FORCE_COLOR, COLUMNS) changes a log file.
    Console(file=output, width=width, force_terminal=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()).strip("\n")
