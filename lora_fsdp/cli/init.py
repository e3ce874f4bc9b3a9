"""`lora-fsdp init`: a task file, a recipe and an accelerate YAML to start from."""

from __future__ import annotations

import json
import keyword
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import Command, required
from lora_fsdp.cli.configs import find_config
from lora_fsdp.cli.launchers import LAUNCHERS
from lora_fsdp.cli.terminal import write
from lora_fsdp.errors import ArgumentError, OutputFileError, did_you_mean

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
# lora-fsdp tasks check --config {recipe}
# lora-fsdp train --config {recipe} --accelerate_config {accelerate}
model_name_or_path: {model}
task: {name}
task_file: {task_file}
data_file: {data_file}
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
    """What is known already; the rest is filled in by hand."""

    name: str = option("", "Name of the task, for example ticket.")
    folder: str = option(".", "Where the three files are written.")
    data_file: str = option("data.csv", "The table.")
    text_column: str = option("text", "Column with the text.")
    label_column: str = option("label", "Column with the label.")
    instruction: str = option(
        "Classify the following text. Output exactly one label:", "What the model is told to do."
    )
    model_name_or_path: str = option(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "Model folder, or a name on the Hugging Face Hub."
    )
    accelerate_config: str | None = option(
        None, "The shipped accelerate YAML to copy: fsdp2_cpu, or fsdp2_hosts with --launcher."
    )
    launcher: str | None = option(
        None,
        "Write a file for several machines, too: slurm, skypilot, kubeflow, ray or torchrun.",
    )
    num_machines: int = option(2, "Machines, with --launcher.")
    gpus_per_machine: int = option(8, "GPUs of each, with --launcher.")


def init(options: InitOptions) -> int:
    """Write the files, all or none."""
    name = required(options.name, "NAME", "the task, for example ticket")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ArgumentError(f"{name!r} cannot name a task file: use letters, digits and _.")
    folder = Path(options.folder)
    task, recipe, accelerate = (
        folder / f"{name}_task.py",
        folder / f"{name}.yaml",
        folder / f"{name}_accelerate.yaml",
    )
    contents = {
        task: _TASK.format(
            name=name,
            name_text=_quoted(name),
            class_name="".join(part.capitalize() for part in name.split("_")),
            instruction=_quoted(options.instruction),
            text_column=_quoted(options.text_column),
            label_column=_quoted(options.label_column),
        ),
        recipe: _RECIPE.format(
            name=name,
            recipe=recipe,
            accelerate=accelerate,
            model=_yaml(options.model_name_or_path),
            task_file=_yaml(str(task)),
            data_file=_yaml(options.data_file),
        ),
        accelerate: find_config(
            options.accelerate_config or ("fsdp2_hosts" if options.launcher else "fsdp2_cpu")
        ).read_text(encoding="utf-8"),
    }
    start = f"lora-fsdp train --config {recipe} --accelerate_config {accelerate}"
    if options.launcher is not None:
        file, text, start = _launcher_file(options, recipe=recipe, accelerate=accelerate)
        contents[file] = text
    if there := [str(file) for file in contents if file.exists()]:
        raise OutputFileError(f"{', '.join(there)}: already there, and nothing was written.")
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in contents.items():
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
        write(f"wrote {file}")
    write(f"next: lora-fsdp tasks check --config {recipe}")
    write(f"then: {start}")
    return 0


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
        summary="Write a task file, a recipe and an accelerate YAML to start from.",
        examples=(
            "init ticket --data_file tickets.csv --text_column message --label_column team",
            "init ticket --folder tickets --accelerate_config fsdp2",
            "init ticket --launcher slurm --num_machines 2 --gpus_per_machine 8",
        ),
        options=(InitOptions,),
        run=init,
        positional="name",
    ),
)
