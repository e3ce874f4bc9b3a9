"""`lora-fsdp init`: a task file, a recipe and an accelerate YAML to start from."""

from __future__ import annotations

import json
import keyword
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import Command, required
from lora_fsdp.cli.configs import find_config, suggested_config
from lora_fsdp.cli.launchers import LAUNCHERS
from lora_fsdp.cli.terminal import write
from lora_fsdp.errors import ArgumentError, OutputFileError, did_you_mean
from lora_fsdp.printing import visible

_LABELS_SHOWN = 10

_TASK = '''\
"""The task {name!r}: what is learnt, and how the model is asked."""

from lora_fsdp import ClassificationTask, register_task


@register_task
class {class_name}Task(ClassificationTask):
    name = {name_text}
    description = "One line for `lora-fsdp tasks list`"
    # What the model is told to do. The wording matters: say that the answer is one label.
    instruction = {instruction}
    text_column = {text_column}
    label_column = {label_column}
    labels = None  # those that occur in the table; or a tuple, such as ("yes", "no")
'''

_RECIPE = """\
{remark}# {check}
# {train}
# A file is looked for in the working directory, then beside this recipe.
model_name_or_path: {model}
{data}
# max_rows: 1000 # a seeded sample, for a first try
eval_size: 0.1 # held-out share
output_dir: runs/{name}

lora_r: 8
lora_alpha: 32
lora_dropout: 0.0 # exact gradients with the instruction computed once a packed sequence
lora_target_modules: [q_proj, v_proj]

num_train_epochs: 1
per_device_train_batch_size: 8 # examples per process and step
learning_rate: 2.0e-3 # for a model of some 100 M; a 7B takes 2e-4
lr_scheduler_type: linear
logging_steps: 10
save_strategy: epoch
save_total_limit: 2
seed: 0
"""


_PLAIN = re.compile(r"[\w./-]+", re.ASCII)


@dataclass
class InitOptions:
    """What is known already; the rest is read from the table and the machine."""

    name: str = option("", "Name of the task, for example ticket; or the table (tickets.csv).")
    folder: str = option(".", "Where the files are written.")
    data_file: str = option("", "The table; its columns are looked at.")
    encoding: str | None = option(None, "Text encoding of the table; detected when not given.")
    delimiter: str | None = option(None, "Character between its cells; found when not given.")
    sheet: str | None = option(None, "Sheet of a workbook (.xlsx) with several.")
    text_column: str | None = option(None, "Column with the text; guessed when not given.")
    label_column: str | None = option(None, "Column with the label; guessed when not given.")
    instruction: str = option(
        "Classify the following text. Output exactly one label:", "What the model is told to do."
    )
    model_name_or_path: str = option(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "Model folder, or a name on the Hugging Face Hub."
    )
    accelerate_config: str | None = option(
        None,
        "The shipped accelerate YAML to copy. Without it, what fits this machine's GPUs, or "
        "fsdp2_hosts with --launcher.",
    )
    launcher: str | None = option(
        None,
        "Write a file for several machines, too: slurm, skypilot, kubeflow, ray or torchrun.",
    )
    num_machines: int = option(2, "Machines, with --launcher.")
    gpus_per_machine: int = option(8, "GPUs of each, with --launcher.")


@dataclass(frozen=True)
class _Seen:
    """What a table says.

    Attributes:
        task: one of the library's, or "" for one of the user's own: a classification.
        text_column, label_column: of that.
        remark: for the recipe, a line.
        dropped: rows that cannot be used.
    """

    task: str
    text_column: str
    label_column: str
    remark: str
    dropped: int = 0


def init(options: InitOptions) -> int:
    """Look at the table and write the files, all or none."""
    options = _with_table(options)
    name = required(options.name, "NAME", "the task, for example ticket, or your table")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ArgumentError(f"{name!r} cannot name a task file: use letters, digits and _.")
    folder = Path(options.folder)
    task, recipe, accelerate = (
        folder / f"{name}_task.py",
        folder / f"{name}.yaml",
        folder / f"{name}_accelerate.yaml",
    )
    start = _command("train", recipe, accelerate)
    launched: dict[Path, str] = {}
    if options.launcher is not None:
        file, text, start = _launcher_file(options, recipe=recipe, accelerate=accelerate)
        launched[file] = text
    if there := [str(file) for file in (task, recipe, accelerate, *launched) if file.exists()]:
        raise OutputFileError(f"{', '.join(there)}: already there, and nothing was written.")
    seen = _look(options)
    from torch.cuda import device_count

    gpus = device_count()
    fitting = suggested_config(gpus) if options.launcher is None else "fsdp2_hosts"
    config = find_config(options.accelerate_config or fitting).read_text(encoding="utf-8")
    contents = {
        recipe: _recipe(options, seen, name=name, recipe=recipe, accelerate=accelerate),
        accelerate: _for_gpus(config, gpus) if options.launcher is None else config,
        **launched,
    }
    if not seen.task:
        contents[task] = _task(options, seen, name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in contents.items():
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
        write(f"wrote {file}")
    if seen.remark:
        write(seen.remark)
    if not options.data_file:
        write(f"first: put your rows into {folder / 'data.csv'} (columns text and label)")
    write(f"next: {_command('tasks check', recipe)}")
    write(f"then: {start}")
    return 0


def _with_table(options: InitOptions) -> InitOptions:
    """The options, with a table that stands in the name's place."""
    given = Path(options.name)
    is_name = options.name.isidentifier() and not given.exists()
    is_table = bool(given.suffix) or given.exists()
    if not options.name or options.data_file or is_name or not is_table:
        return options
    stem = re.sub(r"\W+", "_", given.name.partition(".")[0].lower()).strip("_") or "task"
    name = f"t_{stem}" if stem[0].isdigit() or keyword.iskeyword(stem) else stem
    return replace(options, name=name, data_file=options.name)


def _look(options: InitOptions) -> _Seen:
    """The task and the columns that the table makes plain.

    Raises:
        DataError, TaskError: it is no table, or they are neither plain nor given.
    """
    text, label = options.text_column, options.label_column
    if not options.data_file:
        return _Seen("", text or "text", label or "label", "")
    from lora_fsdp.data.tables import read_table
    from lora_fsdp.tasks import ClassificationTask
    from lora_fsdp.tasks.guessing import guess_task

    table = read_table(
        options.data_file,
        encoding=options.encoding,
        delimiter=options.delimiter,
        sheet=options.sheet,
        nested=True,
    )
    found = guess_task(table) if text is None and label is None else None
    if found is not None and found != "classification":
        return _Seen(found, "", "", f"{len(table)} rows, made for the task {found}.")
    task = ClassificationTask(text_column=text, label_column=label)
    kept, dropped = task.drop_bad_rows(table)
    bound = task.bind(kept)
    labels = list(bound.labels or ())
    shown = ", ".join(map(repr, labels[:_LABELS_SHOWN]))
    more = f" and {len(labels) - _LABELS_SHOWN} more" if len(labels) > _LABELS_SHOWN else ""
    left_out = f", {dropped} of them without text or label" if dropped else ""
    guessed = f" Columns: {bound.guessed}." if bound.guessed else ""
    remark = f"{len(table)} rows{left_out}; {len(labels)} labels: {shown}{more}.{guessed}"
    return _Seen(
        "",
        str(bound.text_column),
        str(bound.label_column),
        visible(remark, lines=False),
        dropped,
    )


def _task(options: InitOptions, seen: _Seen, name: str) -> str:
    return _TASK.format(
        name=name,
        name_text=_quoted(name),
        class_name="".join(part.capitalize() for part in name.split("_")),
        instruction=_quoted(options.instruction),
        text_column=_quoted(seen.text_column),
        label_column=_quoted(seen.label_column),
    )


def _recipe(options: InitOptions, seen: _Seen, *, name: str, recipe: Path, accelerate: Path) -> str:
    lines = [f"task: {seen.task or name}"]
    if not seen.task:
        lines.append(f"task_file: {_yaml(f'{name}_task.py')}")
    lines.append(f"data_file: {_yaml(_beside(options.data_file or 'data.csv', recipe.parent))}")
    given = {"encoding": options.encoding, "delimiter": options.delimiter, "sheet": options.sheet}
    lines += [f"{key}: {_yaml(value)}" for key, value in given.items() if value is not None]
    if seen.dropped:
        lines.append("on_bad_rows: drop")
    if seen.task == "chat":
        lines.append("chat_template: true")
    return _RECIPE.format(
        remark=f"# {seen.remark}\n" if seen.remark else "",
        check=_command("tasks check", recipe),
        train=_command("train", recipe, accelerate),
        name=name,
        model=_yaml(options.model_name_or_path),
        data="\n".join(lines),
    )


def _beside(name: str, folder: Path) -> str:
    """A path as seen from the recipe's folder, where it is looked for."""
    if not os.path.exists(name):  # the table to come, a pattern, a dataset on the Hub
        return name
    try:
        return os.path.relpath(name, folder)
    except ValueError:  # on another drive
        return os.path.abspath(name)


def _for_gpus(config: str, gpus: int) -> str:
    """The YAML, with a process for each GPU where it asks for several."""
    if gpus < 2 or "use_cpu: true" in config:
        return config
    return re.sub(r"(?m)^num_processes: (?!1$)\d+", f"num_processes: {gpus}", config)


def _command(command: str, recipe: Path, accelerate: Path | None = None) -> str:
    words = ["lora-fsdp", *command.split(), "--config", str(recipe)]
    return shlex.join(
        words if accelerate is None else [*words, "--accelerate_config", str(accelerate)]
    )


def _launcher_file(
    options: InitOptions, *, recipe: Path, accelerate: Path
) -> tuple[Path, str, str]:
    """The file of an engine, its text, and the command that starts it.

    Raises:
        ArgumentError: there is no such engine, or numbers that cannot be.
    """
    launcher = LAUNCHERS.get(str(options.launcher))
    if launcher is None:
        raise ArgumentError(
            f"--launcher {options.launcher}: there is no such one."
            f"{did_you_mean(str(options.launcher), LAUNCHERS)} Known: {', '.join(LAUNCHERS)}."
        )
    for name in ("num_machines", "gpus_per_machine"):
        if getattr(options, name) < 1:
            raise ArgumentError(f"--{name} must be 1 or more, not {getattr(options, name)}.")
    file = Path(options.folder) / f"{options.name}{launcher.ending}"
    names = {"RECIPE": recipe, "YAML": accelerate, "FILE": file}
    if odd := [str(path) for path in names.values() if not _PLAIN.fullmatch(str(path))]:
        raise ArgumentError(
            f"{odd[0]!r} cannot stand in a launcher's file: use letters, digits and ._/- for "
            "--folder."
        )
    values: dict[str, object] = {
        **names,
        "NAME": options.name,
        "DNS": options.name.lower().replace("_", "-").strip("-") or "run",
        "MACHINES": options.num_machines,
        "GPUS": options.gpus_per_machine,
        # 8 for each process of the whole launch, as the recipe has.
        "EXAMPLES": 8 * options.num_machines * options.gpus_per_machine,
    }
    return file, launcher.filled(values), launcher.command.format(file=file)


def _quoted(text: str) -> str:
    """A Python literal with double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _yaml(text: str) -> str:
    """A YAML scalar, quoted where it must be."""
    return str(yaml.safe_dump(text, width=10_000, allow_unicode=True)).splitlines()[0]


COMMANDS = (
    Command(
        name="init",
        summary="Look at a table; write a task file, a recipe and an accelerate YAML for it.",
        examples=(
            "init tickets.csv",
            "init ticket --data_file tickets.csv --text_column message --label_column team",
            "init ticket --folder tickets --accelerate_config fsdp2",
            "init ticket --folder cluster --launcher slurm --num_machines 2 --gpus_per_machine 8",
        ),
        options=(InitOptions,),
        run=init,
        positional="name",
    ),
)
