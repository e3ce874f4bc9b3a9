"""`evaluate()`: a finished adapter measured on a table whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lora_fsdp.data.checking import known_again
from lora_fsdp.errors import NoRowsError
from lora_fsdp.evaluation.metrics import (
    confusion_matrix,
    evaluation_metrics,
    labels_without_rows,
    with_loss_of,
)
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.reporting.run_files import RECORD_FILE, TRAINED_ON
from lora_fsdp.tasks import Example


@dataclass(frozen=True)
class Evaluation:
    """What an adapter reaches on a table.

    Attributes:
        rows: how many were scored.
        rows_left_out: bad ones that were dropped.
        rows_trained_on: of those scored; `None` if the adapter's folder does not say.
        first_row_trained_on: its number in the table, counting from 1.
        rows_shortened: whose text was cut to fit.
        labels_without_rows: of these nothing is measured.
        metrics: the task's, by name.
        confusion_matrix: rows by true (down) and predicted label (across), if there are any.
    """

    rows: int
    rows_left_out: int
    rows_trained_on: int | None
    first_row_trained_on: int | None
    rows_shortened: int
    labels_without_rows: list[str]
    metrics: dict[str, float]
    confusion_matrix: pd.DataFrame | None


def evaluate(
    adapter: str | Path,
    table: pd.DataFrame,
    *,
    predictor: Predictor | None = None,
    on_bad_rows: Literal["error", "drop"] = "error",
    name: str = "The table",
) -> Evaluation:
    """Score every row, as `lora-fsdp evaluate` does.

    Args:
        adapter: folder of a finished run, or a checkpoint in it.
        table: texts and answers under the training table's column names, numbered from 1
            (`load_table`).
        predictor: the adapter loaded before; `None` = load it.
        on_bad_rows: rows without text or with an unknown label: stop, or drop and count.
        name: of the table in errors.

    Raises:
        DataError: the table lacks a column or holds a bad row; no row is left.
        AdapterVerificationError: the folder is not an adapter that this library wrote.
    """
    predictor = predictor or Predictor.from_adapter(adapter)
    dropped = 0
    if on_bad_rows == "drop":
        table, dropped = predictor.task.drop_bad_rows(table)
    task = predictor.task.bind(table, for_training=False)
    examples = task.examples(table)
    if on_bad_rows == "drop":
        taken = [one for one in examples if predictor.encoder.refusal(one) is None]
        examples, dropped = taken, dropped + len(examples) - len(taken)
        if not examples:
            raise NoRowsError(f"{name}: the chat template takes no row.")
    encoded = predictor.encoder.encode(examples)
    raw = predictor.outputs(encoded)
    outputs = predictor.calibrated(raw)
    trained_on = _trained_on(Path(adapter), examples)
    return Evaluation(
        rows=len(examples),
        rows_left_out=dropped,
        rows_trained_on=None if trained_on is None else len(trained_on),
        first_row_trained_on=trained_on[0].row if trained_on else None,
        rows_shortened=sum(example.shortened for example in encoded),
        labels_without_rows=labels_without_rows(task, examples),
        metrics=with_loss_of(
            evaluation_metrics(task, encoded, raw), evaluation_metrics(task, encoded, outputs)
        ),
        confusion_matrix=confusion_matrix(task, encoded, outputs),
    )


def _trained_on(adapter: Path, examples: Sequence[Example]) -> list[Example] | None:
    """The examples that the adapter was trained on; `None` if its folder does not say."""
    # A checkpoint's run keeps its record in the folder above.
    is_checkpoint = adapter.absolute().name.startswith("checkpoint-")
    folder = adapter.absolute().parent if is_checkpoint else adapter
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # a copy without it, or a damaged one
        return None
    known: Any = record.get(TRAINED_ON) if isinstance(record, dict) else None
    if not isinstance(known, list):
        return None
    return known_again(examples, {one for one in known if isinstance(one, str)})
