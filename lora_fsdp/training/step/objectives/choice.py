"""Which objective a task's kind of answer is trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_fsdp.errors import ArgumentError
from lora_fsdp.tasks import Task
from lora_fsdp.training.step.objectives.focal import Focal
from lora_fsdp.training.step.objectives.objective import Objective
from lora_fsdp.training.step.objectives.preference import Preference
from lora_fsdp.training.step.objectives.ranked import Ranked
from lora_fsdp.training.step.objectives.supervised import Supervised

#: By the name that a kind of answer has for it (`AnswerKind.objective`).
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "preference": Preference,
    "supervised": Supervised,
}


#: Options that change what is minimised; 0 = not at all.
SETTINGS = ("label_smoothing_factor", "focal_gamma", "ranked_weight")


def objective_of(task: Task, settings: Mapping[str, Any] | None = None) -> Objective:
    """The objective of the task's kind of answer, with its own settings.

    Args:
        task: what is learnt.
        settings: values of `SETTINGS` by their names; what is missing is 0.

    Raises:
        ArgumentError: the kind of answer has no such loss, or two are asked for.
    """
    kind = task.answer_kind
    smoothing, gamma, weight = (float((settings or {}).get(name) or 0.0) for name in SETTINGS)
    asked = {"focal_gamma": gamma, "ranked_weight": weight}
    for name, value in asked.items():
        if value and name not in kind.losses:
            known = [f"--{one}" for one in kind.losses]
            raise ArgumentError(
                f"--{name} {value:g} cannot be minimised for task {task.name!r}, whose answers are "
                f"{kind.description}: leave it out{f' ({known[0]} can)' if known else ''}."
            )
    given = {"label_smoothing_factor": smoothing, **asked}
    if len(both := [f"--{name}" for name, value in given.items() if value]) > 1:
        raise ArgumentError(f"{' and '.join(both)} are losses of their own: keep one of them.")
    if gamma:
        return Focal(gamma, **kind.objective_settings())
    if weight:
        return Ranked(weight)
    if smoothing and kind.generates_text:
        raise ArgumentError(
            f"--label_smoothing_factor {smoothing} is divided among a row's possible answers, and "
            f"task {task.name!r} has free text: remove it."
        )
    return OBJECTIVES[kind.objective](smoothing=smoothing, **kind.objective_settings())
