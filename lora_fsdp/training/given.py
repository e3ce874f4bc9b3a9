"""What a trainer is given, in the forms that `transformers.Trainer` and `trl.SFTTrainer` take too.

Those two are given tables, folders and plain `TrainingArguments`, where a run has examples of a
task, a base and `FineTuningArguments`. Each form is turned into ours here, or refused in a sentence
that names what to give instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import datasets
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from lora_fsdp.adapter.continuing import adapter_to_continue
from lora_fsdp.adapter.folder import AdapterFolder
from lora_fsdp.arguments import FineTuningArguments, ModelArguments
from lora_fsdp.arguments.training import from_training_arguments
from lora_fsdp.base.loading import load_tokenizer
from lora_fsdp.base.streaming import OpenBase, StoredBase, WholeBase, open_base
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.tables import dataset_table
from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks import Example, Task, get_task

Base = OpenBase | PeftModel


class RowsOfDataset(Protocol):
    """A `datasets.Dataset`, whose stubs nobody has, so that other things are told from it."""

    @property
    def column_names(self) -> list[str]: ...

    @property
    def num_rows(self) -> int: ...


#: Examples of a task, or the rows that it makes them of.
Rows = Sequence[Example] | Sequence[EncodedExample] | Sequence[Mapping[str, Any]] | RowsOfDataset


@dataclass(frozen=True)
class GivenData:
    """A task, settled by its rows, and its examples.

    Attributes:
        task: bound to the training rows, if rows were given.
        train: examples to train on.
        held_out: all held-out examples.
        test: further ones, which no evaluation while training sees.
        names: of the held-out datasets with the number of their examples, in the order of
            `held_out`; empty where there is one without a name.
    """

    task: Task
    train: Sequence[Example]
    held_out: Sequence[Example]
    test: Sequence[Example]
    names: Mapping[str, int]


def given_arguments(args: TrainingArguments | None) -> FineTuningArguments:
    """Ours, with all that plain `TrainingArguments` say.

    Raises:
        ArgumentError: they are of another kind.
    """
    if args is None:
        return FineTuningArguments()
    if isinstance(args, FineTuningArguments):
        return args
    if not isinstance(args, TrainingArguments):
        raise ArgumentError(
            f"args must be FineTuningArguments or transformers.TrainingArguments, not a "
            f"{type(args).__name__}."
        )
    return from_training_arguments(args)


def given_data(task: Task | str, *, train: Rows | None, held_out: Any, test: Any) -> GivenData:
    """The examples of all datasets; of rows, the task makes them.

    Args:
        task: it, or its name.
        train: examples or rows.
        held_out: examples or rows, or several datasets of either by name.
        test: examples or rows.

    Raises:
        ArgumentError: there is no task, or a dataset is of another kind.
        DataError: the rows are not what the task needs.
    """
    bound = _given_task(task)
    if is_rows(train):
        table = dataset_table(train, name="train_dataset")
        bound = bound.bind(table)
        train = bound.examples(table)
    parts = held_out if isinstance(held_out, Mapping) else {"": held_out}
    examples = {
        name: examples_of(part, task=bound, name=f"eval_dataset {name}".rstrip())
        for name, part in parts.items()
    }
    if isinstance(held_out, Mapping) and not all(isinstance(n, str) and n for n in held_out):
        raise ArgumentError("The keys of eval_dataset name its metrics: they must be texts.")
    names = {name: len(part) for name, part in examples.items() if name}
    together = [example for part in examples.values() for example in part]
    learnt = examples_of(train, task=bound, name="train_dataset")
    tested = examples_of(test, task=bound, name="test_dataset")
    return GivenData(bound, learnt, together, tested, names)


def examples_of(rows: Any, *, task: Task, name: str) -> Sequence[Example]:
    """Examples as they are, and rows as the task makes examples of them.

    Args:
        rows: a dataset.
        task: bound.
        name: of the argument, for messages.

    Raises:
        ArgumentError: it is neither.
        DataError: the rows are not what the task needs.
    """
    if rows is None:
        return []
    if is_rows(rows):
        table = dataset_table(rows, name=name)
        return task.bind(table, for_training=False).examples(table)
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        strange = next((x for x in rows if not isinstance(x, Example | EncodedExample)), None)
        if strange is None:
            return cast(Sequence[Example], rows)
        given = f"a list with a {type(strange).__name__}"
    else:
        given = f"a {type(rows).__name__}"
    raise ArgumentError(
        f"{name} is {given}: give a datasets.Dataset (one split, not streamed), a list of rows "
        "(dicts), or the examples that Task.examples makes of a table (pandas.DataFrame)."
    )


def by_name(
    examples: list[EncodedExample], names: Mapping[str, int]
) -> list[EncodedExample] | dict[str, list[EncodedExample]]:
    """Examples of several datasets, one after the other, by the datasets' names."""
    if not names:
        return examples
    rest = iter(examples)
    return {name: list(islice(rest, count)) for name, count in names.items()}


def is_rows(data: Any) -> bool:
    """Whether `data` holds rows, and not yet examples: a `datasets.Dataset`, or a list of dicts."""
    if isinstance(data, Sequence) and not isinstance(data, str):
        return bool(data) and isinstance(data[0], Mapping)
    return isinstance(data, datasets.Dataset)


def given_tokenizer(given: object, model: Base | str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, by default the model's own.

    Raises:
        ArgumentError: there is none.
        TokenizerNotFoundError: the model's folder holds none.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is not None:
        raise ArgumentError(
            f"processing_class must be a tokenizer, not a {type(given).__name__}: of a processor, "
            "give its .tokenizer."
        )
    name = model if isinstance(model, str) else _name_of(model)
    if not name:
        raise ArgumentError("The model has no name to load a tokenizer by: give processing_class=.")
    return load_tokenizer(ModelArguments(name))


def given_base(model: object, *, peft_config: object, device: torch.device) -> Base:
    """The base, opened where it is a folder or a name on the Hub.

    Raises:
        ArgumentError: it is no model, or its adapter is not a `peft.LoraConfig`.
        ModelError: it cannot be opened.
    """
    if not isinstance(peft_config, PeftConfig | None):
        raise ArgumentError(
            f"peft_config must be a peft.LoraConfig, not a {type(peft_config).__name__}."
        )
    if isinstance(model, str):
        if peft_config is None:
            raise ArgumentError(
                f"model={model!r} is to get an adapter: give peft_config=peft.LoraConfig(...)."
            )
        config = cast(LoraConfig, peft_config)
        return open_base(ModelArguments(model), device=device, peft_config=config)
    if isinstance(model, Base):
        return model
    given = "None" if model is None else f"a {type(model).__name__}"
    raise ArgumentError(
        f"model is {given}: give a causal language model (transformers.PreTrainedModel), a "
        "PeftModel with a LoRA adapter, a folder, or a name on the Hugging Face Hub."
    )


def given_adapter(
    peft_config: LoraConfig | None, saved: str | Path | None
) -> tuple[LoraConfig | None, AdapterFolder | None]:
    """The adapter's settings, and the saved adapter that is gone on with, which has its own.

    Raises:
        AdapterVerificationError: the folder holds none, or a damaged one.
    """
    if saved is None:
        return peft_config, None
    start = adapter_to_continue(saved)
    return start.config if peft_config is None else peft_config, start


def given_callbacks(callbacks: object) -> list[TrainerCallback]:
    """The callbacks, as a list of their own.

    Raises:
        ArgumentError: something else is among them.
    """
    if not isinstance(callbacks, Sequence | None):
        raise ArgumentError(f"callbacks must be a list, not a {type(callbacks).__name__}.")
    for one in callbacks or ():
        kind = one if isinstance(one, type) else type(one)
        if not issubclass(kind, TrainerCallback):
            raise ArgumentError(
                f"A callback is a transformers.TrainerCallback, not a {kind.__name__}."
            )
    return list(callbacks or ())


def _given_task(task: Task | str) -> Task:
    if isinstance(task, str) and task:
        return get_task(task)
    if isinstance(task, type):
        raise ArgumentError(
            f"task is the class {task.__name__}: give an object, {task.__name__}()."
        )
    if task and not isinstance(task, str):
        return task
    raise ArgumentError(
        "LoraTrainer trains for a task, which makes examples of rows and knows their metrics: "
        "give task=, an object or a name (lora-fsdp tasks list), see docs/tasks.md."
    )


def _name_of(model: Any) -> str:
    if isinstance(model, WholeBase):
        return model.arguments.model_name_or_path
    inner = model.model if isinstance(model, StoredBase) else model
    return str(getattr(getattr(inner, "config", None), "name_or_path", "") or "")
