"""A pool of rows without answers in, those to label next out, with all their own columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_fsdp.data.streams import Chunk, TableStream
from lora_fsdp.errors import ArgumentError, NoRowsError, OutputFileError
from lora_fsdp.evaluation.answering.columns import refuse_taken_names
from lora_fsdp.evaluation.answering.rows import examples_of_chunk, has_text
from lora_fsdp.evaluation.answering.unfinished import check_output_name
from lora_fsdp.evaluation.ensemble import Ensemble
from lora_fsdp.evaluation.labelling.next_rows import rank, unsure
from lora_fsdp.evaluation.outputs import write_atomically
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.tasks import Example, Task
from lora_fsdp.tasks.answers import ModelOutputs

#: The column that is added beside those of `lora-fsdp predict`.
SCORE = "score"
_ALL_ROWS = 1 << 30
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class NextRows:
    """What was chosen.

    Attributes:
        output: the table.
        rows: numbers in the pool of the rows in it, in its order (1 = first data row).
        pool: how many rows the pool has.
        without_text: numbers of its rows that have no text.
    """

    output: Path
    rows: Sequence[int]
    pool: int
    without_text: Sequence[int]


def check_can_be_unsure(task: Task) -> None:
    """Refuse a task whose answers are not chosen among the same ones in every row.

    Raises:
        ArgumentError: says so.
    """
    kind = task.answer_kind
    if not kind.asked_alike:
        raise ArgumentError(
            f"The answers of task {task.name!r} are {kind.description}: what to label next is told "
            "by the probabilities of answers that all rows share (one label, several labels, "
            "several questions). Choose rows otherwise."
        )


def check_output(stream: TableStream, output: Path, *, overwrite: bool) -> None:
    """Refuse an output that would replace something or has another format.

    Raises:
        ArgumentError, OutputFileError: says what to name.
    """
    check_output_name(stream, output, what="pool", option="--output_file")
    if output.is_dir():
        raise OutputFileError(f"{output} is a folder: name another --output_file.")
    if output.exists() and not overwrite:
        raise OutputFileError(
            f"{output} is already there: name another --output_file, or replace it with "
            "--overwrite."
        )
    if not output.absolute().parent.is_dir():
        raise OutputFileError(f"The folder of {output} does not exist: create it.")


def choose_next(
    predictor: Predictor | Ensemble,
    stream: TableStream,
    output: Path,
    *,
    count: int,
    by: str = "margin",
    seed: int = 0,
    column_prefix: str = "",
    on_rows: Callable[[int], None] | None = None,
) -> NextRows:
    """Write the rows of a pool whose answers would teach most, the first first.

    Args:
        predictor: the adapter, or several.
        stream: the pool.
        output: of the pool's format; its columns are the pool's as written, `score`, and those of
            `lora-fsdp predict`.
        count: how many rows; all that have a text if there are fewer.
        by: "margin" or "entropy" of the predicted probabilities.
        seed: of the clusters.
        column_prefix: put before the new columns' names.
        on_rows: called with the number of rows asked, now and then.

    Raises:
        ArgumentError: the task's kind of answer is another, or a new column's name is taken.
        NoRowsError: the pool has no row with a text.
        ColumnNotFoundError, MalformedRowError: as `predict_file`.
    """
    check_can_be_unsure(predictor.task)
    chunk = next(stream.chunks(_ALL_ROWS), None)
    if chunk is None:
        raise NoRowsError(f"{stream.path} holds no rows.")
    examples = examples_of_chunk(predictor.task, stream, chunk)
    places = [place for place, one in enumerate(examples) if has_text(one)]
    if not places:
        raise NoRowsError(f"None of the {len(examples)} rows of {stream.path} has a text.")
    kind = predictor.task.answer_kind
    names = [SCORE, *kind.predicted_columns([], predictor.outputs([]))]
    refuse_taken_names([f"{column_prefix}{name}" for name in names], chunk)
    asked = [examples[place] for place in places]
    outputs = _answered(predictor, asked, on_rows=on_rows)
    scores = unsure(kind.probabilities_by_question(outputs), by=by)
    ranked = rank(scores, [one.prompt.content for one in asked], count=count, seed=seed)
    chosen = [asked[one] for one in ranked]
    added: dict[str, Sequence[Any]] = {
        SCORE: scores[ranked].tolist(),
        **kind.predicted_columns(chosen, outputs.of(ranked)),
    }
    added = {f"{column_prefix}{name}": values for name, values in added.items()}
    _write(stream, _rows_of(chunk, [places[one] for one in ranked]), added, output)
    return NextRows(
        output,
        [one.row for one in chosen],
        len(examples),
        [one.row for one in examples if not has_text(one)],
    )


def _answered(
    predictor: Predictor | Ensemble,
    examples: Sequence[Example],
    *,
    on_rows: Callable[[int], None] | None,
) -> ModelOutputs:
    """What is given for N rows, of which some are asked at a time."""
    found: list[ModelOutputs] = []
    for first in range(0, len(examples), _ROWS_AT_ONCE):
        some = examples[first : first + _ROWS_AT_ONCE]
        found.append(predictor.calibrated(predictor.outputs(some)))
        if on_rows is not None:
            on_rows(len(some))
    return ModelOutputs(
        np.concatenate([one.log_likelihoods for one in found]),
        np.concatenate([one.tokens for one in found]),
    )


def _rows_of(chunk: Chunk, places: Sequence[int]) -> Chunk:
    rows = chunk.rows
    taken = rows.take(list(places)) if isinstance(rows, pa.Table) else [rows[n] for n in places]
    return replace(chunk, rows=taken)


def _write(
    stream: TableStream, chunk: Chunk, added: dict[str, Sequence[Any]], output: Path
) -> None:
    """Through the stream's own writing of parts, which are packed only when they are joined."""
    part = output.with_name(f".{output.name}.part{stream.file.suffix}")
    try:
        stream.write(chunk, added, part)
        write_atomically(output, lambda path: stream.join([part], path))
    finally:
        part.unlink(missing_ok=True)
