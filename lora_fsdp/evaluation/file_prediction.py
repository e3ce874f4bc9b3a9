"""A table in, the same table with answers out: in chunks, and after a kill from where it was.

Every chunk becomes a file of its own in `<output>.partial`, written beside and renamed, so that it
is complete or not there; the chunks that are there are done. At the end they are joined into the
output, which also appears in one rename.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_fsdp.base.folders import read_json_object, sha256_of_file
from lora_fsdp.data.streams import Chunk, TableStream
from lora_fsdp.distributed.workers import Workers
from lora_fsdp.errors import (
    ArgumentError,
    ColumnNotFoundError,
    MalformedRowError,
    NoRowsError,
    OutputFileError,
)
from lora_fsdp.evaluation.ensemble import Ensemble
from lora_fsdp.evaluation.outputs import write_atomically, write_json
from lora_fsdp.evaluation.prediction import Predictor, examples_of_texts
from lora_fsdp.tasks import Example, Task

_JOB_FILE = "job.json"


@dataclass(frozen=True)
class Confidence:
    """What is asked of the answers' probabilities.

    Attributes:
        least: a row whose answer is less probable gets no answer; `None` = every row gets one.
        coverage: the share of rows whose set of answers is to hold the right one; `None` = no sets.
    """

    least: float | None = None
    coverage: float | None = None


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
    target = Path(output)
    if chunk_rows < 1:
        raise ArgumentError(f"--chunk_rows {chunk_rows}: give a number of rows from 1.")
    confidence = confidence or Confidence()
    check_confidence(predictor, confidence)
    _refuse_other_format(stream, target)
    folder = target.with_name(f"{target.name}.partial")
    job = {
        "input": sha256_of_file(stream.path),
        "adapter": identity,
        "task": predictor.task.options(),
        "chunk_rows": chunk_rows,
        "column_prefix": column_prefix,
        "separator": stream.separator,
        "calibration": None if predictor.calibration is None else predictor.calibration.to_json(),
        "confidence": asdict(confidence),
    }
    workers = workers or Workers()
    answer = partial(_answers, predictor, prefix=column_prefix, confidence=confidence)
    if workers.is_first:
        _check_place(target, folder, job, overwrite=overwrite)
        _check_beginning(predictor, stream, chunk_rows=chunk_rows, answer=answer)
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _JOB_FILE, dict(job))
    workers.wait_for_first("the output is begun")
    if not workers.is_first:
        _check_shared(folder, job)
    before = {file.name for file in folder.iterdir()}
    workers.wait("what is done is seen")
    parts: list[_Part] = []
    for part in _parts(
        predictor.task,
        stream,
        folder,
        chunk_rows=chunk_rows,
        ending=target.suffix,
        answer=answer,
        workers=workers,
    ):
        parts.append(part._replace(resumed=part.file.name in before))
        if on_chunk is not None:
            on_chunk(parts[-1].rows, parts[-1].resumed)
    workers.wait("every row is answered")
    unsure = 0
    if workers.is_first:
        unsure = sum(_unsure_of(part.file) for part in parts)
        write_atomically(target, lambda path: stream.join([part.file for part in parts], path))
        shutil.rmtree(folder)
    workers.wait("the output is there")
    return FilePrediction(
        target,
        rows=sum(part.rows for part in parts),
        resumed=sum(part.rows for part in parts if part.resumed),
        without_text=[row for part in parts for row in part.without_text],
        unsure=unsure,
    )


def _parts(
    task: Task,
    stream: TableStream,
    folder: Path,
    *,
    chunk_rows: int,
    ending: str,
    answer: Callable[[Sequence[Example]], tuple[dict[str, list[Any]], int]],
    workers: Workers,
) -> Iterator[_Part]:
    """The table's chunks as this process answers them; of the first process, the others' too."""
    for number, chunk in enumerate(stream.chunks(chunk_rows)):
        file = folder / f"{chunk.first:012d}{ending}"
        if workers.does(number):
            yield _answer_chunk(task, stream, chunk, file, answer=answer)
        elif workers.is_first:
            yield _part_of(examples_of_chunk(task, stream, chunk), chunk, file)


def check_confidence(predictor: Predictor | Ensemble, confidence: Confidence) -> None:
    """Refuse what the probabilities of this adapter cannot answer.

    Raises:
        ArgumentError: names the option.
    """
    named = {"--min_probability": confidence.least, "--coverage": confidence.coverage}
    for option, value in named.items():
        if value is None:
            continue
        if not 0 < value < 1:
            raise ArgumentError(f"{option} {value}: give a number between 0 and 1.")
        if "probability" not in _answers(predictor, [])[0]:
            raise ArgumentError(
                f"{option} {value}: the answers of task {predictor.task.name!r} have no "
                "probabilities."
            )
    if confidence.coverage is not None and predictor.calibration is None:
        raise ArgumentError(
            f"--coverage {confidence.coverage}: the sets need the calibration that a run fits on "
            "50 held-out rows or more, and there is none: of this adapter, of several together, "
            "or with --calibrated false."
        )


def _check_beginning(
    predictor: Predictor | Ensemble,
    stream: TableStream,
    *,
    chunk_rows: int,
    answer: Callable[[Sequence[Example]], tuple[dict[str, list[Any]], int]],
) -> None:
    """Refuse a table by its first rows, before anything is replaced or written.

    Raises:
        NoRowsError: it has no rows.
        ColumnNotFoundError, ArgumentError, MalformedRowError: as `predict_file`.
    """
    chunk = next(stream.chunks(chunk_rows), None)
    if chunk is None:
        raise NoRowsError(f"{stream.path} holds no rows.")
    examples_of_chunk(predictor.task, stream, chunk)
    refuse_taken_names(answer([])[0], chunk)


class _Part(NamedTuple):
    file: Path
    rows: int
    resumed: bool
    without_text: list[int]


def _answer_chunk(
    task: Task,
    stream: TableStream,
    chunk: Chunk,
    file: Path,
    *,
    answer: Callable[[Sequence[Example]], tuple[dict[str, list[Any]], int]],
) -> _Part:
    """Write the chunk with its answers to `file`, if an earlier call has not."""
    resumed = file.is_file()
    examples = examples_of_chunk(task, stream, chunk)
    if not resumed:
        added, unsure = answer(examples)
        refuse_taken_names(added, chunk)
        if unsure:  # before the answers, which say that the chunk is done
            write_json(_unsure_file(file), {"unsure": unsure})
        write_atomically(file, partial(stream.write, chunk, added))
    return _part_of(examples, chunk, file)._replace(resumed=resumed)


def _unsure_file(file: Path) -> Path:
    """How many rows of a chunk get no answer because of `Confidence.least`; none = 0."""
    return file.with_name(f"{file.name}.unsure.json")


def _unsure_of(file: Path) -> int:
    there = _unsure_file(file)
    return int(read_json_object(there.parent, there.name)["unsure"]) if there.is_file() else 0


def _part_of(examples: Sequence[Example], chunk: Chunk, file: Path) -> _Part:
    without_text = [example.row for example in examples if not _has_text(example)]
    return _Part(file, len(chunk), False, without_text)


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
    columns, _ = _answers(predictor, examples, confidence=confidence)
    return [{name: values[i] for name, values in columns.items()} for i in range(len(texts))]


def examples_of_chunk(task: Task, stream: TableStream, chunk: Chunk) -> list[Example]:
    """`examples_of_records` of some rows of a table."""
    return examples_of_records(
        task,
        stream.records(chunk),
        columns=chunk.columns,
        first=chunk.first,
        source=str(stream.path),
    )


def examples_of_records(
    task: Task,
    records: Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str],
    first: int,
    source: str,
) -> list[Example]:
    """Examples without a target, of rows that are to be answered.

    Args:
        task: bound.
        records: the rows by column.
        columns: the table's, for the message.
        first: number of the first row.
        source: what the message calls the table.

    Raises:
        ColumnNotFoundError: the text column is missing, or another one that the task needs.
        MalformedRowError: a row's own choices are missing, or fewer than two.
    """
    numbered = enumerate(records, start=first)
    try:
        return [_example(task, record, row=row, source=source) for row, record in numbered]
    except KeyError as error:
        there = ", ".join(map(repr, columns))
        raise ColumnNotFoundError(
            f"{source} has no column {error} (row {first} and after); there are "
            f"{there}. Name the column with the text by --text_column; others must be called as "
            "in training."
        ) from error


def _example(task: Task, record: Mapping[str, Any], *, row: int, source: str) -> Example:
    example = Example(row, task.build_prompt(record), None)
    if not _has_text(example):  # it gets no answer, so it needs no choices either
        return example
    if (fault := task.input_fault(record)) is not None:
        raise MalformedRowError(f"{source}, row {row}: {fault}. Correct the row or take it out.")
    return replace(example, choices=task.checked_choices(row, record))


def _has_text(example: Example) -> bool:
    return bool(example.prompt.text.strip())


def _answers(
    predictor: Predictor | Ensemble,
    examples: Sequence[Example],
    *,
    prefix: str = "",
    confidence: Confidence | None = None,
) -> tuple[dict[str, list[Any]], int]:
    """The new columns, `None` where there is no text; and how many answers were left out."""
    confidence, unsure = confidence or Confidence(), 0
    found = answer_columns(predictor, examples, coverage=confidence.coverage)
    if confidence.least is not None:
        column = predictor.task.answer_kind.answer_column
        unsure = leave_out_unsure(found, column=column, least=confidence.least)
    return {f"{prefix}{name}": values for name, values in found.items()}, unsure


def answer_columns(
    predictor: Predictor | Ensemble, examples: Sequence[Example], *, coverage: float | None = None
) -> dict[str, list[Any]]:
    """The new columns of N rows, `None` in a row without a text.

    Args:
        predictor: the adapter.
        examples: the rows.
        coverage: of the sets of answers; `None` = no sets.
    """
    places = [place for place, example in enumerate(examples) if _has_text(example)]
    columns = predictor.columns([examples[place] for place in places], coverage=coverage)
    spread: dict[str, list[Any]] = {name: [None] * len(examples) for name in columns}
    for name, values in columns.items():
        for place, value in zip(places, values, strict=True):
            spread[name][place] = value
    return spread


def leave_out_unsure(columns: Mapping[str, list[Any]], *, column: str, least: float) -> int:
    """Empty the answers that are less probable than `least`; returns how many."""
    unsure = 0
    for place, probability in enumerate(columns["probability"]):
        if probability is not None and probability < least:
            columns[column][place], unsure = None, unsure + 1
    return unsure


def _refuse_other_format(stream: TableStream, target: Path) -> None:
    source, suffix = stream.path, stream.output_suffix
    if not target.name.lower().endswith(suffix):
        raise ArgumentError(
            f"{target} is no {suffix} file: the output has the input's format, so that its rows "
            f"stay what they are; name it *{suffix}."
        )
    if target.exists() and target.samefile(source):
        raise OutputFileError(f"{target} is the input: name another --output.")


def refuse_taken_names(added: Iterable[str], chunk: Chunk) -> None:
    """Refuse new columns that a table already has.

    Raises:
        ArgumentError: names them.
    """
    if taken := [name for name in added if name in chunk.columns]:
        raise ArgumentError(
            f"The table already has {', '.join(map(repr, taken))}: give the new columns other "
            "names, for example with --column_prefix new_."
        )


def _check_place(target: Path, folder: Path, job: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse to replace, or to go on with, what is not this job's."""
    if target.is_dir():
        raise OutputFileError(f"{target} is a folder: name another --output.")
    _refuse_other_folder(folder)
    if overwrite:
        return
    if target.exists():
        raise OutputFileError(
            f"{target} is already there: name another --output, or replace it with --overwrite."
        )
    if (folder / _JOB_FILE).is_file():
        begun = read_json_object(folder, _JOB_FILE)
        if other := [name for name, value in job.items() if begun.get(name) != value]:
            raise OutputFileError(
                f"{folder} holds a part of {target.name} that was made with another "
                f"{', '.join(other)}: start anew with --overwrite."
            )


def _check_shared(folder: Path, job: Mapping[str, Any]) -> None:
    """Refuse to answer chunks that the first process would not find, or of another table.

    Raises:
        OutputFileError: the folder is not the first one's, or what it was begun for is not here.
    """
    if not (folder / _JOB_FILE).is_file():
        raise OutputFileError(
            f"{folder} of the first process is not there on this machine: give an --output on a "
            "disk that all machines share."
        )
    begun = read_json_object(folder, _JOB_FILE)
    if other := [name for name, value in job.items() if begun.get(name) != value]:
        raise OutputFileError(
            f"This machine has another {', '.join(other)} than the first one: give every process "
            "the same table, adapter and options."
        )


def _refuse_other_folder(folder: Path) -> None:
    """Refuse to write into, or remove, what an earlier prediction has not made."""
    if not (folder.exists() or folder.is_symlink()):
        return
    ours = folder.is_dir() and not folder.is_symlink()
    if ours and not (folder / _JOB_FILE).is_file():  # killed before it wrote one
        ours = all(entry.name.startswith(f".{_JOB_FILE}.") for entry in folder.iterdir())
    if not ours:
        raise OutputFileError(
            f"{folder} is where unfinished answers would lie, and is not of an earlier prediction: "
            "move it away, or name another --output."
        )
