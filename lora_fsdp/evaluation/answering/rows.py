"""Rows that are to be answered, as examples without a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_fsdp.data.streams import Chunk, TableStream
from lora_fsdp.errors import ColumnNotFoundError, MalformedRowError
from lora_fsdp.tasks import Example, Task


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
    if not has_text(example):  # it gets no answer, so it needs no choices either
        return example
    if (fault := task.input_fault(record)) is not None:
        raise MalformedRowError(f"{source}, row {row}: {fault}. Correct the row or take it out.")
    return replace(example, choices=task.checked_choices(row, record))


def has_text(example: Example) -> bool:
    """Whether there is anything to answer."""
    return bool(example.prompt.text.strip())
