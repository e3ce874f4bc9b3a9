"""From what the user named to training and held-out examples of a bound task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from lora_fsdp.arguments import DataArguments
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.few_shot import take_shots
from lora_fsdp.data.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    Parts,
    complete_parts,
    divide_by_column,
    files_by_split,
    find_split_column,
)
from lora_fsdp.data.tables import joined, read_table, sample_rows
from lora_fsdp.errors import ArgumentError, NoRowsError, SplitError
from lora_fsdp.tasks import Example, Task, get_task
from lora_fsdp.tasks.files import import_task_file
from lora_fsdp.tasks.guessing import guess_task
from lora_fsdp.tasks.renaming import new_names
from lora_fsdp.tasks.shots import Shot
from lora_fsdp.tasks.weights import bad_weights, check_weights, weighted

logger = logging.getLogger(__name__)

_TASK_OPTIONS = ("instruction", "text_column", "label_column", "labels")


@dataclass(frozen=True)
class TaskData:
    """A bound task with its examples.

    Attributes:
        task: bound to its table.
        train: examples to train on.
        held_out: those that are evaluated while training.
        dropped: how many rows were left out as unusable.
        test: those that are scored before and after training and decide nothing; empty = the
            held-out ones are also what is reported.
        splits: where the parts come from, a line each.
        shots: rows that every prompt shows with their answers; they are not trained on.
    """

    task: Task
    train: list[Example]
    held_out: list[Example]
    dropped: int
    test: list[Example] = field(default_factory=list)
    splits: tuple[str, ...] = ()
    shots: tuple[Shot, ...] = ()

    @property
    def reported(self) -> list[Example]:
        """What the report is about."""
        return self.test or self.held_out

    @property
    def scored(self) -> list[Example]:
        """All that are not trained on."""
        return [*self.held_out, *self.test]


def load_task_data(
    arguments: DataArguments, *, seed: int, task: Task | None = None, choosing: bool = False
) -> TaskData:
    """Read, sample, check and split the rows.

    Args:
        arguments: where the rows are and how to take them.
        seed: of the sample and of the split.
        task: stands in for the task that the arguments name.
        choosing: whether something, such as the best checkpoint, is chosen by the held-out rows.
    """
    import_task_file(arguments.task_file)
    task = _choose_task(arguments, task)
    parts = _named_parts(arguments, task)
    whole = parts.train
    table = sample_rows(whole, max_rows=arguments.max_rows, head=arguments.head, seed=seed)
    table, dropped = _without_bad_rows(arguments, task, table)
    table, without_weight = _without_bad_weights(arguments, table)
    dropped += without_weight
    task = task.bind(table)
    if task.guessed:
        logger.info("Columns: %s.", task.guessed)
    parts = _divided(arguments, task, replace(parts, train=table), whole=whole)
    parts = complete_parts(
        parts,
        columns=task.split_columns(),
        eval_size=arguments.eval_size,
        test_size=arguments.test_size,
        choosing=choosing,
        seed=seed,
    )
    scored = []
    for part in (parts.validation, parts.test):
        examples, dropped_there = _scored_examples(arguments, task, part)
        dropped += dropped_there
        scored.append(examples)
    for line in parts.said:
        logger.info("Rows: %s.", line)
    train = weighted(
        task,
        task.examples(parts.train),
        parts.train,
        column=arguments.weight_column,
        classes=arguments.class_weights,
    )
    if weightless := len(parts.train) - len(train):
        logger.warning("Left out %d training rows that weigh 0.", weightless)
    return TaskData(task, train, scored[0], dropped + weightless, scored[1], parts.said)


def encoder_of(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task,
    shots: Sequence[Shot] = (),
) -> Encoder:
    """The encoder that the arguments describe.

    Args:
        arguments: the run's.
        tokenizer: the base's.
        task: bound.
        shots: rows that its prompts show (`TaskData.shots`).

    Raises:
        ArgumentError, UnsafeFileError: the tokenizer's chat template does not allow what they ask.
    """
    return Encoder(
        tokenizer,
        task=task,
        max_length=arguments.max_length,
        chat_template=arguments.chat_template,
        chat_template_kwargs=arguments.template_kwargs(),
        thinking=arguments.thinking,
        shots=shots,
    )


def settled_rows(
    arguments: DataArguments,
    data: TaskData,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    *,
    seed: int,
) -> TaskData:
    """`data` as a run takes it: without refused conversations, and with what its prompts show.

    Args:
        arguments: as for `load_task_data`.
        data: what it found.
        tokenizer: loads the tokenizer, if it is needed.
        seed: of the draw of shown rows.

    Raises:
        NoRowsError: the chat template refuses every row to train on.
        ArgumentError: there are too few rows to show.
    """
    data = without_refused_rows(arguments, data, tokenizer)
    count = arguments.few_shot
    if not count or not data.train:
        return data
    encoder = encoder_of(arguments, tokenizer(), task=data.task)
    shots, train = take_shots(encoder, data.train, count=count, besides=data.scored, seed=seed)
    return replace(data, train=train, shots=shots)


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
    encoder = encoder_of(arguments, tokenizer(), task=data.task)
    train = [one for one in data.train if encoder.refusal(one) is None]
    held_out = [one for one in data.held_out if encoder.refusal(one) is None]
    test = [one for one in data.test if encoder.refusal(one) is None]
    before = len(data.train) + len(data.scored)
    refused = before - len(train) - len(held_out) - len(test)
    if data.train and not train:
        raise NoRowsError(f"The chat template takes no row: {encoder.refusal(data.train[0])}")
    if refused:
        logger.warning("Left out %d rows that the chat template refuses.", refused)
    if data.test and not test:
        raise NoRowsError(f"The chat template takes no test row: {encoder.refusal(data.test[0])}")
    dropped = data.dropped + refused
    return replace(data, train=train, held_out=held_out, test=test, dropped=dropped)


def _choose_task(arguments: DataArguments, task: Task | None) -> Task:
    options = {name: getattr(arguments, name) for name in _TASK_OPTIONS}
    further: dict[str, Any] = dict(arguments.task_options or {})  # type: ignore[arg-type]
    if twice := [name for name in further if options.get(name) is not None]:
        raise ArgumentError(
            f"{', '.join(twice)} stands in --task_options and in an option of its own: keep one."
        )
    if names := new_names(arguments.rename_labels or [], arguments.merge_labels or []):
        options["label_names"] = names
    options |= further
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if task is None:
        return get_task(arguments.task or _guessed_task(arguments), options)
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


def _guessed_task(arguments: DataArguments) -> str:
    """The name of the task that the table's columns are made for.

    Raises:
        ArgumentError: no table is named, or its columns do not say.
    """
    advice = "set --task (for example --task sentiment)"
    if arguments.data_file is None:
        raise ArgumentError(f"No task given: {advice}.")
    files = files_by_split(Path(arguments.data_file)).get(TRAIN, [arguments.data_file])
    table = _read(arguments, files)
    name = guess_task(_with_named_columns(table, arguments))
    if name is None:
        raise ArgumentError(
            f"No task given, and the columns of {arguments.data_file} "
            f"({', '.join(map(repr, table.columns))}) do not say which: {advice}."
        )
    logger.info("Task: %s, by the columns of %s; name another with --task.",
                name, arguments.data_file)  # fmt: skip
    return name


def _with_named_columns(table: pd.DataFrame, arguments: DataArguments) -> pd.DataFrame:
    """The table with the columns that are named called `text` and `label`, for a guess."""
    named = {arguments.text_column: "text", arguments.label_column: "label"}
    return table.rename(columns={old: new for old, new in named.items() if old is not None})


def _named_parts(arguments: DataArguments, task: Task) -> Parts:
    """What is named as files: rows to train on, and perhaps others."""
    named = {VALIDATION: arguments.eval_file, TEST: arguments.test_file}
    files: dict[str, Sequence[str | Path]] = {
        split: [name] for split, name in named.items() if name is not None
    }
    said = [f"{split} rows are those of {Path(file).name}" for split, [file] in files.items()]
    if arguments.data_file is None:
        own = task.load(TRAIN)
        if own is None:
            raise ArgumentError(f"Task {task.name!r} brings no data of its own: set --data_file.")
        if arguments.delimiter is not None and not files:
            raise ArgumentError(
                f"--delimiter is of --data_file; task {task.name!r} brings its own rows."
            )
        train, test = own, None if files else task.load(TEST)
    else:
        there = files_by_split(Path(arguments.data_file))
        files_of_train = there.pop(TRAIN, [arguments.data_file])
        if there:
            said += [_said_of_folder(arguments, split, split in files) for split in there]
            files = there | files
        train, test = _read(arguments, files_of_train), None
    if TEST in files:
        test = _read(arguments, files[TEST])
    validation = _read(arguments, files[VALIDATION]) if VALIDATION in files else None
    return Parts(train, validation, test, tuple(said))


def _said_of_folder(arguments: DataArguments, split: str, is_named: bool) -> str:
    """That a folder has rows of a split, and whether they are used."""
    folder = Path(str(arguments.data_file)).absolute().name
    if is_named:
        return f"the {split} rows of the folder {folder} are not used: another file is named"
    return f"{split} rows are those of the folder {folder}"


def _read(arguments: DataArguments, files: Sequence[str | Path]) -> pd.DataFrame:
    """One table, or several of the same columns one after the other."""
    tables = [
        read_table(
            file,
            encoding=arguments.encoding,
            delimiter=arguments.delimiter,
            sheet=arguments.sheet,
            nested=True,
        )
        for file in files
    ]
    if len(tables) == 1:
        return tables[0]
    table = joined(tables, files)
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table


def _divided(arguments: DataArguments, task: Task, parts: Parts, *, whole: pd.DataFrame) -> Parts:
    """What a column of the training table says of its rows, if there is such a column."""
    column = arguments.split_column
    if column == "none":
        return parts
    if column is None:
        column = find_split_column(whole, besides=_used_columns(task))
    if column is None:
        return parts
    divided = divide_by_column(parts.train, column, whole=whole)
    for split, option in ((VALIDATION, "--eval_file"), (TEST, "--test_file")):
        if getattr(divided, split) is not None and getattr(parts, split) is not None:
            raise SplitError(
                f"Column {column!r} says of rows that they are of the split {split!r}, and so does "
                f"another file: leave out {option}, or the column with --split_column none."
            )
    return replace(
        divided,
        validation=parts.validation if divided.validation is None else divided.validation,
        test=parts.test if divided.test is None else divided.test,
        said=(*parts.said, *divided.said),
    )


def _used_columns(task: Task) -> list[str | None]:
    """The columns that a task reads, as far as its options and splits name them."""
    named = [value for name, value in task.options().items() if name.endswith("_column")]
    return [*task.split_columns(), *named]


def _scored_examples(
    arguments: DataArguments, task: Task, table: pd.DataFrame | None
) -> tuple[list[Example], int]:
    """Examples of rows that are not trained on, and how many were left out."""
    if table is None:
        return [], 0
    kept, dropped = _without_bad_rows(arguments, task, table)
    return task.bind(kept, for_training=False).examples(kept), dropped


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
