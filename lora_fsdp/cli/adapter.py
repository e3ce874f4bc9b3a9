"""The options and the loading that the commands for a finished adapter share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_fsdp.arguments.adapter import parse_json_object
from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import required
from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks.files import import_task_file

if TYPE_CHECKING:
    from lora_fsdp.evaluation.ensemble import Ensemble
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
    task: str | None = option(
        None,
        "Of an adapter that was trained elsewhere: the task it is asked as (classification). A "
        "run's own adapter knows it, and the five options below.",
    )
    labels: list[str] | None = option(None, "Of such an adapter: its labels, word for word.")
    instruction: str | None = option(None, "Of such an adapter: what its prompts begin with.")
    task_options: str | None = option(None, "Of such an adapter: more of the task, as JSON.")
    max_length: int | None = option(
        None, "Of such an adapter: the longest example in tokens (512)."
    )
    chat_template: bool = option(
        False, "Of such an adapter: put its prompts through the chat template."
    )


#: What says how an adapter is asked that was trained elsewhere; a run's own says it itself.
_ASKED = ("task", "labels", "instruction", "task_options", "max_length", "chat_template")


@dataclass
class AdaptersOptions(AdapterOptions):
    """Which adapters, and how they are loaded."""

    adapter: list[str] = field(  # type: ignore[assignment]
        default_factory=list,
        metadata={
            "help": "Output folder of a finished run; several, or a run of several adapters, "
            "answer by the mean of their probabilities."
        },
    )

    def folders(self) -> list[Path]:
        """The adapters' folders; of a run of several adapters, those of its adapters.

        Raises:
            ArgumentError: none is named, or the run is not finished.
        """
        from lora_fsdp.sweeps.earlier import adapters_of

        if not self.adapter or "" in self.adapter:  # also what an unset variable leaves
            required(None, "--adapter", "the output folder of a finished run")
        return [folder for given in self.adapter for folder in adapters_of(Path(given))]


def load_adapters(
    options: AdaptersOptions,
    folders: Sequence[Path],
    *,
    calibrated: bool = True,
    questions: Sequence[str] | None = None,
) -> Predictor | Ensemble:
    """One adapter, or several that answer together, asked as they were trained.

    Those that answer together are not calibrated: the mean of their probabilities is another one.
    Of a task with several questions, `questions` are those that are asked; `None` = all.
    """
    if len(folders) == 1:
        one = AdapterOptions(**{**vars(options), "adapter": str(folders[0])})
        return load_predictor(one, calibrated=calibrated, questions=questions)
    if said := [f"--{name}" for name in _given(options)]:
        raise ArgumentError(
            f"Adapters that answer together say themselves how they are asked: leave out "
            f"{', '.join(said)}."
        )
    import_task_file(options.task_file)
    from lora_fsdp.evaluation.ensemble import Ensemble
    from lora_fsdp.scripts import configure_output
    from lora_fsdp.tasks import get_task

    configure_output()
    ensemble = Ensemble.from_adapters(
        folders, base=options.base, dtype=options.dtype, questions=questions
    )
    if options.text_column is not None:
        own = {**ensemble.task.options(), "text_column": options.text_column}
        ensemble = replace(ensemble, task=get_task(ensemble.task.name, own))
    return ensemble


def load_predictor(
    options: AdapterOptions,
    *,
    label_column: str | None = None,
    calibrated: bool = True,
    questions: Sequence[str] | None = None,
) -> Predictor:
    """The adapter, asked as it was trained, about the columns named."""
    folder = Path(required(options.adapter, "--adapter", "the output folder of a finished run"))
    import_task_file(options.task_file)
    from lora_fsdp.evaluation.prediction import Predictor
    from lora_fsdp.scripts import configure_output
    from lora_fsdp.tasks import get_task

    configure_output()
    predictor = Predictor.from_adapter(
        folder,
        base=options.base,
        dtype=options.dtype,
        calibrated=calibrated,
        asked=_asked(options, folder, label_column=label_column),
        questions=questions,
    )
    named = {"text_column": options.text_column, "label_column": label_column}
    given = {name: value for name, value in named.items() if value is not None}
    if given:
        task = get_task(predictor.task.name, {**predictor.task.options(), **given})
        predictor = replace(predictor, task=task)
    return predictor


def _given(options: AdapterOptions) -> list[str]:
    values = {name: getattr(options, name) for name in _ASKED}
    return [name for name, value in values.items() if value is not None and value is not False]


def _asked(
    options: AdapterOptions, folder: Path, *, label_column: str | None
) -> dict[str, Any] | None:
    """How an adapter is asked that was trained elsewhere; `None` if no option speaks of it."""
    given = _given(options)
    if not given:
        return None
    if options.task is None:
        raise ArgumentError(
            f"--{given[0]} is for an adapter that was trained elsewhere: name its --task as well, "
            "or leave it out."
        )
    from lora_fsdp.evaluation.prediction import as_asked
    from lora_fsdp.tasks import get_task

    # Columns are guessed from tables to train on; there is none here.
    chosen = {
        "text_column": options.text_column or "text",
        "label_column": label_column or "label",
    }
    known = get_task(options.task).options()
    task = get_task(
        options.task,
        {
            "labels": options.labels,
            "instruction": options.instruction,
            **{name: column for name, column in chosen.items() if name in known},
            **parse_json_object("task_options", options.task_options or "{}"),
        },
    )
    if "labels" in known and not task.options().get("labels"):
        raise ArgumentError(
            f"--labels is missing: task {options.task!r} has a set of labels, and {folder} does "
            "not say which."
        )
    length = 512 if options.max_length is None else options.max_length
    if length < 1:
        raise ArgumentError(f"--max_length must be 1 or more, not {length}.")
    return as_asked(folder, task, max_length=length, chat_template=options.chat_template)
