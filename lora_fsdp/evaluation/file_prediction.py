"""A table in, the same table with answers out: in chunks, and after a kill from where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_fsdp.base.folders import sha256_of_file
from lora_fsdp.data.streams import Chunk, TableStream
from lora_fsdp.distributed.workers import Workers
from lora_fsdp.errors import ArgumentError, NoRowsError
from lora_fsdp.evaluation.answering.columns import (
    Confidence,
    asked_columns,
    check_confidence,
    refuse_taken_names,
)
from lora_fsdp.evaluation.answering.rows import examples_of_chunk, has_text
from lora_fsdp.evaluation.answering.unfinished import Unfinished, check_output_name
from lora_fsdp.evaluation.ensemble import Ensemble
from lora_fsdp.evaluation.prediction import Predictor, examples_of_texts
from lora_fsdp.tasks import Example


@dataclass(frozen=True)
class FilePrediction:
    """What was done.

    Attributes:
        output: the finished table.
        rows: rows of the table.
        resumed: how many of them an earlier call had already answered.
        without_text: numbers of the rows that have no text, and so no answer.
        unsure: how many rows of this call got no answer because it was not probable enough.
    """

    output: Path
    rows: int
    resumed: int
    without_text: Sequence[int]
    unsure: int = 0


def predict_file(
    predictor: Predictor | Ensemble,
    stream: TableStream,
    output: str | Path,
    *,
    chunk_rows: int = 256,
    column_prefix: str = "",
    identity: str = "",
    confidence: Confidence | None = None,
    overwrite: bool = False,
    on_chunk: Callable[[int, bool], None] | None = None,
    workers: Workers | None = None,
) -> FilePrediction:
    """Answer every row of a table.

    Args:
        predictor: the adapter.
        stream: the table.
        output: a file of the same format; its columns are the table's and those of the task's kind
            of answer (`AnswerKind.predicted_columns`), empty in a row without text.
        chunk_rows: rows that are read, answered and written at a time.
        column_prefix: put before the new columns' names.
        identity: says which adapter this is; an unfinished output of another one is not continued.
        confidence: which rows get an answer, and whether all get a set of answers.
        overwrite: replace an output, finished or not, that is already there.
        on_chunk: called after each chunk with its rows and whether it had been done before.
        workers: processes that divide the chunks between them, on a disk that they share; the first
            one joins the output. `None` = this one alone.

    Raises:
        OutputFileError: the output is there, or was begun for another input or adapter.
        ColumnNotFoundError, ArgumentError: the text column is missing, or a new one is not new.
        MalformedRowError: a row's own choices are missing, or fewer than two.
    """
    if chunk_rows < 1:
        raise ArgumentError(f"--chunk_rows {chunk_rows}: give a number of rows from 1.")
    asked = _Asked(
        predictor, stream, Path(output), chunk_rows, column_prefix, confidence or Confidence()
    )
    check_confidence(predictor, asked.confidence)
    check_output_name(stream, asked.output, what="input", option="--output")
    workers = workers or Workers()
    unfinished = asked.begun(identity, workers, overwrite=overwrite)
    parts: list[_Part] = []
    for part in asked.parts(unfinished, workers):
        parts.append(part)
        if on_chunk is not None:
            on_chunk(part.rows, part.resumed)
    workers.wait("every row is answered")
    unsure = unfinished.join([part.file for part in parts]) if workers.is_first else 0
    workers.wait("the output is there")
    return FilePrediction(
        asked.output,
        rows=sum(part.rows for part in parts),
        resumed=sum(part.rows for part in parts if part.resumed),
        without_text=[row for part in parts for row in part.without_text],
        unsure=unsure,
    )


class _Part(NamedTuple):
    file: Path
    rows: int
    resumed: bool
    without_text: list[int]


@dataclass(frozen=True)
class _Asked:
    """What `predict_file` is asked for."""

    predictor: Predictor | Ensemble
    stream: TableStream
    output: Path
    chunk_rows: int
    column_prefix: str
    confidence: Confidence

    def job(self, identity: str) -> dict[str, Any]:
        """All that the answers depend on."""
        calibration = self.predictor.calibration
        return {
            "input": sha256_of_file(self.stream.path),
            "adapter": identity,
            "task": self.predictor.task.options(),
            "chunk_rows": self.chunk_rows,
            "column_prefix": self.column_prefix,
            "separator": self.stream.separator,
            "calibration": None if calibration is None else calibration.to_json(),
            "confidence": asdict(self.confidence),
        }

    def begun(self, identity: str, workers: Workers, *, overwrite: bool) -> Unfinished:
        """The output's folder, begun by the first of the processes. A collective call."""
        unfinished = Unfinished(self.stream, self.output, self.job(identity))
        if workers.is_first:
            unfinished.check_place(overwrite=overwrite)
            self._check_beginning()
            unfinished.begin(overwrite=overwrite)
        workers.wait_for_first("the output is begun")
        if not workers.is_first:
            unfinished.check_shared()
        return unfinished

    def parts(self, unfinished: Unfinished, workers: Workers) -> Iterator[_Part]:
        """Answer this process's chunks that are not answered yet; the first one sees them all."""
        before = set(unfinished.folder.iterdir())
        workers.wait("what is done is seen")
        for number, chunk in enumerate(self.stream.chunks(self.chunk_rows)):
            if not (mine := workers.does(number)) and not workers.is_first:
                continue
            file = unfinished.file_of(chunk)
            without_text = self._answer(chunk, unfinished, leave=not mine or file.is_file())
            yield _Part(file, len(chunk), file in before, without_text)

    def _check_beginning(self) -> None:
        """Refuse a table by its first rows, before anything is replaced or written."""
        chunk = next(self.stream.chunks(self.chunk_rows), None)
        if chunk is None:
            raise NoRowsError(f"{self.stream.path} holds no rows.")
        examples_of_chunk(self.predictor.task, self.stream, chunk)
        refuse_taken_names(self._columns([])[0], chunk)

    def _answer(self, chunk: Chunk, unfinished: Unfinished, *, leave: bool) -> list[int]:
        """Write a chunk's answers, but where it is to be left; numbers of its rows without text."""
        examples = examples_of_chunk(self.predictor.task, self.stream, chunk)
        if not leave:
            added, unsure = self._columns(examples)
            refuse_taken_names(added, chunk)
            unfinished.write(chunk, added, unsure=unsure)
        return [example.row for example in examples if not has_text(example)]

    def _columns(self, examples: Sequence[Example]) -> tuple[dict[str, list[Any]], int]:
        prefix, confidence = self.column_prefix, self.confidence
        return asked_columns(self.predictor, examples, prefix=prefix, confidence=confidence)


def answers_of(
    predictor: Predictor | Ensemble,
    texts: Sequence[str],
    *,
    confidence: Confidence | None = None,
) -> list[dict[str, Any]]:
    """The new columns' values for each of `texts`, as in the output of `predict_file`.

    Raises:
        ArgumentError: the task needs more than one text.
    """
    confidence = confidence or Confidence()
    check_confidence(predictor, confidence)
    asked = dict(enumerate(texts, start=1))
    examples = examples_of_texts(predictor.task, asked, advice="give a table, not a text.")
    columns, _ = asked_columns(predictor, examples, confidence=confidence)
    return [{name: values[i] for name, values in columns.items()} for i in range(len(texts))]
