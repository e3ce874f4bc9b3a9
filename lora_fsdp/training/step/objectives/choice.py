"""Which objective a task's kind of answer is trained with."""

from __future__ import annotations

from collections.abc import Callable

from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks import Task
from lora_fsdp.training.step.objectives.objective import Objective
from lora_fsdp.training.step.objectives.preference import Preference
from lora_fsdp.training.step.objectives.supervised import Supervised

#: By the name that a kind of answer has for it (`AnswerKind.objective`).
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "preference": Preference,
    "supervised": Supervised,
}


def objective_of(task: Task, *, smoothing: float) -> Objective:
    """The objective of the task's kind of answer, with its own settings.

    Args:
        task: what is learnt.
        smoothing: `--label_smoothing_factor`.

    Raises:
        ArgumentError: there is nothing to smooth over.
    """
    kind = task.answer_kind
    if smoothing and kind.generates_text:
        raise ArgumentError(
            f"--label_smoothing_factor {smoothing} is divided among a row's possible answers, and "
            f"task {task.name!r} has free text: remove it."
        )
    return OBJECTIVES[kind.objective](smoothing=smoothing, **kind.objective_settings())
