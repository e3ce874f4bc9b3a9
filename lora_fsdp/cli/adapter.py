"""The options and the loading that the commands for a finished adapter share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import required
from lora_fsdp.tasks.files import import_task_file

if TYPE_CHECKING:
    from lora_fsdp.evaluation.prediction import Predictor


@dataclass
class AdapterOptions:
    """Which adapter, and how it is loaded."""

    _argument_group_name: ClassVar[str] = "adapter"

    adapter: str = option("", "Output folder of a finished run.")
    base: str | None = option(
        None, "Base model's folder or Hub name, if it is not where the adapter says."
    )
    task_file: str | None = option(None, "Python file to import first; it registers the task.")
    text_column: str | None = option(
        None, "Column with the text, if it is not the training table's."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "The base's dtype; auto = bfloat16 on GPUs."
    )


def load_predictor(options: AdapterOptions, *, label_column: str | None = None) -> Predictor:
    """The adapter, asked as it was trained, about the columns named."""
    folder = Path(required(options.adapter, "--adapter", "the output folder of a finished run"))
    import_task_file(options.task_file)
    from lora_fsdp.evaluation.prediction import Predictor
    from lora_fsdp.scripts import configure_output
    from lora_fsdp.tasks import get_task

    configure_output()
    predictor = Predictor.from_adapter(folder, base=options.base, dtype=options.dtype)
    named = {"text_column": options.text_column, "label_column": label_column}
    given = {name: value for name, value in named.items() if value is not None}
    if given:
        task = get_task(predictor.task.name, {**predictor.task.options(), **given})
        predictor = replace(predictor, task=task)
    return predictor
