"""From what the user named to training and held-out examples of a bound task."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from lora_fsdp.arguments import DataArguments
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.splits import split_table
from lora_fsdp.data.tables import read_table, sample_rows
from lora_fsdp.errors import ArgumentError, NoRowsError
from lora_fsdp.tasks import Example, Task, get_task
from lora_fsdp.tasks.files import import_task_file
from lora_fsdp.tasks.weights import bad_weights, check_weights, weighted

logger = logging.getLogger(__name__)

_TASK_OPTIONS = ("instruction", "text_column", "label_column", "labels")


@dataclass(frozen=True)
class TaskData:
    """A bound task with its examples; `dropped` rows were left out as unusable."""

    task: Task
    train: list[Example]
    held_out: list[Example]
    dropped: int


def load_task_data(arguments: DataArguments, *, seed: int, task: Task | None = None) -> TaskData:
    """Read, sample, check and split the rows.

    Args:
        arguments: where the rows are and how to take them.
        seed: of the sample and of the split.
        task: stands in for the task that the arguments name.
    """
    import_task_file(arguments.task_file)
    task = _choose_task(arguments, task)
    table = _training_table(arguments, task)
    table = sample_rows(table, max_rows=arguments.max_rows, head=arguments.head, seed=seed)
    table, dropped = _without_bad_rows(arguments, task, table)
    table, without_weight = _without_bad_weights(arguments, table)
    dropped += without_weight
    task = task.bind(table)
    if arguments.eval_file is not None:
        held_out = _read(arguments, arguments.eval_file)
    else:
        own = task.load("test") if arguments.data_file is None else None
        table, held_out = (table, own) if own is not None else _split(arguments, task, table, seed)
    held_out, dropped_there = _without_bad_rows(arguments, task, held_out)
    evaluated = task.bind(held_out, for_training=False)
    train = weighted(
        task,
        task.examples(table),
        table,
        column=arguments.weight_column,
        classes=arguments.class_weights,
    )
    if weightless := len(table) - len(train):
        logger.warning("Left out %d training rows that weigh 0.", weightless)
    left_out = dropped + dropped_there + weightless
    return TaskData(task, train, evaluated.examples(held_out), left_out)


def without_refused_rows(
    arguments: DataArguments,
    data: TaskData,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> TaskData:
    """`data` without the conversations that the chat template refuses, with `--on_bad_rows drop`.

    Args:
        arguments: as for `load_task_data`.
        data: what it found.
        tokenizer: loads the tokenizer, if it is needed.

    Raises:
        NoRowsError: it refuses every row to train on.
    """
    if arguments.on_bad_rows != "drop" or not arguments.chat_template:
        return data
    encoder = Encoder(tokenizer(), task=data.task, chat_template=True)
    train = [one for one in data.train if encoder.refusal(one) is None]
    held_out = [one for one in data.held_out if encoder.refusal(one) is None]
    refused = len(data.train) + len(data.held_out) - len(train) - len(held_out)
    if data.train and not train:
        raise NoRowsError(f"The chat template takes no row: {encoder.refusal(data.train[0])}")
    if refused:
        logger.warning("Left out %d rows that the chat template refuses.", refused)
    return TaskData(data.task, train, held_out, data.dropped + refused)


def _choose_task(arguments: DataArguments, task: Task | None) -> Task:
    options = {name: getattr(arguments, name) for name in _TASK_OPTIONS}
    further: dict[str, Any] = dict(arguments.task_options or {})  # type: ignore[arg-type]
    if twice := [name for name in further if options.get(name) is not None]:
        raise ArgumentError(
            f"{', '.join(twice)} stands in --task_options and in an option of its own: keep one."
        )
    options |= further
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if task is None:
        if not arguments.task:
            raise ArgumentError("No task given: set --task (for example --task sentiment).")
        return get_task(arguments.task, options)
    if arguments.task and arguments.task != task.name:
        raise ArgumentError(
            f"--task {arguments.task} and the task object {task.name!r} contradict each other: "
            "leave one out."
        )
    if given:
        raise ArgumentError(
            f"{', '.join(given)} would be ignored, because a task object was passed: set them on "
            "the task instead."
        )
    return task


def _training_table(arguments: DataArguments, task: Task) -> pd.DataFrame:
    if arguments.data_file is not None:
        return _read(arguments, arguments.data_file)
    own = task.load("train")
    if own is None:
        raise ArgumentError(f"Task {task.name!r} brings no data of its own: set --data_file.")
    if arguments.delimiter is not None and arguments.eval_file is None:
        raise ArgumentError(f"--delimiter is of --data_file; task {task.name!r} brings its own.")
    return own


def _read(arguments: DataArguments, file: str) -> pd.DataFrame:
    return read_table(file, encoding=arguments.encoding, delimiter=arguments.delimiter)


def _without_bad_rows(
    arguments: DataArguments, task: Task, table: pd.DataFrame
) -> tuple[pd.DataFrame, int]:
    if arguments.on_bad_rows != "drop":
        return table, 0
    kept, dropped = task.drop_bad_rows(table)
    if dropped:
        logger.warning("Left out %d of %d rows without text or label.", dropped, len(table))
    return kept, dropped


def _without_bad_weights(arguments: DataArguments, table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The table without rows that have no weight, or an error that names them."""
    column = arguments.weight_column
    if column is None:
        return table, 0
    if arguments.on_bad_rows != "drop":
        check_weights(table, column)
        return table, 0
    bad = bad_weights(table, column)
    if len(bad):
        logger.warning("Left out %d of %d rows without a weight.", len(bad), len(table))
    return table[~table.index.isin(bad.index)], len(bad)


def _split(
    arguments: DataArguments, task: Task, table: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    text_column, label_column = task.split_columns()
    return split_table(
        table,
        text_column=text_column,
        label_column=label_column,
        test_size=arguments.eval_size,
        seed=seed,
    )
