"""`lora-fsdp tasks`: which there are, what one says, and what it makes of a table."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_fsdp.arguments import DataArguments
from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import Command, print_json, required
from lora_fsdp.cli.terminal import table_text, write
from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks import get_task, list_tasks
from lora_fsdp.tasks.files import import_task_file

if TYPE_CHECKING:
    from lora_fsdp.data.checking import TaskCheck
    from lora_fsdp.data.encoding import EncodedExample, Encoder
    from lora_fsdp.data.rows import TaskData
    from lora_fsdp.tasks import Example


@dataclass
class ListOptions:
    """Options of `tasks list`."""

    task_file: str | None = option(None, "Python file to import first; it registers the task.")
    json: bool = option(False, "Print JSON.")


@dataclass
class ShowOptions(ListOptions):
    """Options of `tasks show`."""

    name: str = option("", "The task.")


@dataclass
class CheckOptions:
    """Options of `tasks check` beside those of the task and its rows."""

    rows: int = option(20, "How many rows to print.")
    model_name_or_path: str = option(
        "", "Model whose tokenizer counts and marks the tokens; none = text only."
    )
    seed: int = option(42, "Seed of the sample and of the split.")
    json: bool = option(False, "Print JSON.")


def show_list(options: ListOptions) -> int:
    """Every known task; those that cannot be used with the reason."""
    import_task_file(options.task_file)
    tasks = list_tasks()
    if options.json:
        print_json([dataclasses.asdict(task) for task in tasks])
        return 0
    for task in tasks:
        write(f"{task.name:<20} {task.description or f'BROKEN: {task.broken}'}")
    return 0


def show_one(options: ShowOptions) -> int:
    """What one task says: its instruction, columns, labels, metric."""
    import_task_file(options.task_file)
    task = get_task(required(options.name, "NAME", "a task (lora-fsdp tasks list)"))
    facts: dict[str, Any] = {
        "name": task.name,
        "description": task.description,
        "class": f"{type(task).__module__}:{type(task).__qualname__}",
        "primary_metric": task.primary_metric,
        "answers": task.answer_kind.description,
        **task.facts(),
    }
    if options.json:
        print_json(facts)
        return 0
    for name, value in facts.items():
        write(f"{name:<16} {_shown(value)}")
    write(f"\n{inspect.getdoc(type(task)) or ''}")
    return 0


def _shown(value: Any) -> str:
    if value is None:
        return "read from the table"
    if isinstance(value, list):
        return (
            ", ".join(" and ".join(v) if isinstance(v, list) else str(v) for v in value) or "none"
        )
    return str(value)


def check(options: CheckOptions, data_args: DataArguments) -> int:
    """The task's view of a table: prompts as the model gets them, then counts and warnings."""
    from lora_fsdp.data.checking import check_task_data
    from lora_fsdp.data.rows import load_task_data

    data = load_task_data(data_args, seed=options.seed)
    data, encoder = _settled(options, data_args, data)
    examples = [*data.train, *data.scored]
    encoded = None if encoder is None else encoder.encode(examples)
    found = check_task_data(data, encoded)
    tokens_of: Sequence[EncodedExample | None] = encoded or [None] * len(examples)
    shown = list(zip(examples, tokens_of, strict=True))[: options.rows]
    if options.json:
        rows = [_row_facts(example, tokens) for example, tokens in shown]
        facts = {
            name: getattr(found, name)
            for name in (*found.__dataclass_fields__, "warnings")
            if name not in ("task", "concerns")
        }
        print_json({"task": data.task.name, **data.task.options(), **facts, "rows": rows})
        return 0
    if data.task.guessed:
        write(f"columns: {data.task.guessed}\n")
    for example, tokens in shown:
        _print_row(example, tokens, encoder)
    _print_counts(found, encoded)
    return 0


def _settled(
    options: CheckOptions, data_args: DataArguments, data: TaskData
) -> tuple[TaskData, Encoder | None]:
    """The rows as a run takes them, and what makes tokens of them if a model is named."""
    if not options.model_name_or_path:
        if data_args.few_shot:
            raise ArgumentError(
                "--few_shot: which rows a prompt shows depends on the tokenizer, too: name the "
                "model by --model_name_or_path."
            )
        return data, None
    from lora_fsdp.arguments import ModelArguments
    from lora_fsdp.base.loading import load_tokenizer
    from lora_fsdp.data.rows import encoder_of, settled_rows

    model = ModelArguments(model_name_or_path=options.model_name_or_path)
    tokenizer = load_tokenizer(model)
    data = settled_rows(data_args, data, lambda: tokenizer, seed=options.seed)
    return data, encoder_of(data_args, tokenizer, task=data.task, shots=data.shots)


def _row_facts(example: Example, tokens: EncodedExample | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "row": example.row,
        "prompt": str(example.prompt),
        "target": example.target,
    }
    if example.choices:
        facts["choices"] = list(example.choices)
    if example.references:
        facts["references"] = list(example.references)
    if tokens is None:
        return facts
    return facts | {
        "prompt_tokens": len(tokens.prompt_ids),
        "supervised_token_ids": tokens.target_ids,
        "shortened": tokens.shortened,
    }


def _print_row(example: Example, tokens: EncodedExample | None, encoder: Encoder | None) -> None:
    """The exact prompt; what is learnt stands in brackets, a pair for each token."""
    heading = f"---- row {example.row}"
    prompt, learnt = str(example.prompt), f"[{example.target}]"
    if tokens is not None and encoder is not None:
        heading += f": {len(tokens.prompt_ids)} prompt tokens, {len(tokens.target_ids)} learnt"
        heading += ", shortened" if tokens.shortened else ""
        decode = partial(encoder.tokenizer.decode, clean_up_tokenization_spaces=False)
        prompt = str(decode(tokens.prompt_ids))
        learnt = "".join(f"[{decode([token])}]" for token in tokens.target_ids)
    write(heading)
    write(prompt, marked=learnt)
    if example.choices:
        write(f"  scored: {', '.join(map(repr, example.choices))}")
    if len(example.references) > 1:
        write(f"  right as well: {', '.join(map(repr, example.references[1:]))}")


def _print_counts(found: TaskCheck, encoded: list[EncodedExample] | None) -> None:
    write(f"\ntask {found.task.name}; the model learns what stands in [brackets]")
    if found.balance:
        rows = [(label, *map(str, counts)) for label, counts in found.balance.items()]
        write(table_text(("label", "training", "held out"), rows))
    test = f", {found.test_rows} for the test" if found.test_rows else ""
    write(f"{found.training_rows} training rows, {found.held_out_rows} held out{test}")
    for line in found.splits:
        write(f"  {line}")
    write(f"{found.left_out} rows left out as unusable")
    write(f"{found.repeated} rows whose text occurs more than once (kept on one side of the split)")
    if encoded is None:
        write("tokens not counted: name a model with --model_name_or_path")
    else:
        lengths = sorted(e.tokens for e in encoded)
        learnt = sum(len(e.target_ids) for e in encoded)
        write(f"{lengths[len(lengths) // 2]} tokens a row in the median, {lengths[-1]} at most")
        write(f"{learnt} supervised tokens, {found.shortened} rows shortened")
        if found.balance:
            write("every label has tokens of its own to this tokenizer")
    for warning in found.warnings:
        write(f"warning: {warning}")
    if not found.warnings:
        write("nothing suspicious found")


COMMANDS = (
    Command(
        name="tasks list",
        summary="List the tasks that can be trained.",
        examples=("tasks list", "tasks list --task_file ticket_task.py", "tasks list --json"),
        options=(ListOptions,),
        run=show_list,
    ),
    Command(
        name="tasks show",
        summary="Show a task's instruction, columns and labels.",
        examples=("tasks show sentiment", "tasks show sentiment --json"),
        options=(ShowOptions,),
        run=show_one,
        positional="name",
    ),
    Command(
        name="tasks check",
        summary="Look at a table as a task sees it, before training.",
        examples=(
            "tasks check tweets.csv --task sentiment",
            "tasks check --config recipe.yaml --rows 3",
            "tasks check tickets.csv --task classification --text_column message \\\n"
            '      --label_column team --instruction "Which team? One word:"',
        ),
        options=(CheckOptions, DataArguments),
        run=check,
        positional="data_file",
        shares_recipe=True,
    ),
)
