"""Tasks by name: those registered in this process and those that installed packages bring.

A package brings a task by an entry point, named like the task::

    [project.entry-points."lora_fsdp.tasks"]
    spam = "my_package.tasks:SpamTask"

It is imported only when it is asked for or listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from lora_fsdp.errors import (
    ArgumentError,
    BrokenTaskError,
    DuplicateTaskError,
    IncompleteTaskError,
    LoraFsdpError,
    TaskError,
    UnknownTaskError,
    did_you_mean,
)
from lora_fsdp.tasks.base import Task

ENTRY_POINT_GROUP = "lora_fsdp.tasks"

TaskClass = TypeVar("TaskClass", bound=type[Task])

# What claims a name: a class registered here, or an entry point that is not loaded yet.
_Claim = type[Task] | EntryPoint

_registered: dict[str, type[Task]] = {}


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """One line of the list of tasks.

    Attributes:
        name: what `get_task` takes.
        description: the task's own description; empty if it is broken.
        origin: where its class is defined, as "module:Class".
        broken: why it cannot be used, or `None`.
    """

    name: str
    description: str
    origin: str
    broken: str | None = None


def register_task(task_class: TaskClass) -> TaskClass:
    """Makes a task known under its class attribute `name`; usable as a decorator.

    Registering a class again, also after its notebook cell or module was run again, replaces it.

    Raises:
        IncompleteTaskError: not a `Task` subclass, or one without a name.
        DuplicateTaskError: another class has that name.
    """
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise IncompleteTaskError(f"register_task takes a subclass of Task, not {task_class!r}.")
    if not task_class.name:
        raise IncompleteTaskError(
            f"{_origin(task_class)} has no name: set the class attribute `name`."
        )
    other = _registered.get(task_class.name, task_class)
    if _origin(other) != _origin(task_class):
        raise _duplicate(task_class.name, [_origin(other), _origin(task_class)])
    _registered[task_class.name] = task_class
    return task_class


def get_task(name: str, options: Mapping[str, object] | None = None) -> Task:
    """An instance of the task called `name`.

    Args:
        name: a registered task's or an entry point's name.
        options: keyword arguments for the task's constructor; those that are `None` count as not
            given.

    Raises:
        UnknownTaskError, DuplicateTaskError, BrokenTaskError: there is no such task, more than
            one, or one that cannot be imported.
        ArgumentError: the task has no such option, or needs one that is not given.
    """
    claims = _claims()
    if name not in claims:
        raise UnknownTaskError(
            f"No task {name!r}.{did_you_mean(name, claims)} Known: "
            f"{', '.join(sorted(claims))}. A task of a script is known once its module has been "
            "imported."
        )
    if len(claims[name]) > 1:
        raise _duplicate(name, claims[name])
    (claim,) = claims[name].values()
    task_class = _load(name, claim)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    signature = inspect.signature(task_class)
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ArgumentError(
            f"Task {name!r}: {error}. Its options: {', '.join(signature.parameters) or 'none'}."
        ) from error
    return _make(name, task_class, given, is_plug_in=not isinstance(claim, type))


def _make(name: str, task_class: type[Task], given: Mapping[str, Any], *, is_plug_in: bool) -> Task:
    if not is_plug_in:  # the user's own: a traceback shows where
        return task_class(**given)
    try:
        return task_class(**given)
    except LoraFsdpError:
        raise
    except (Exception, SystemExit) as error:
        raise BrokenTaskError(
            f"Task {name!r} ({_origin(task_class)}) fails when it is made: "
            f"{type(error).__name__}: {error}. Update or uninstall its package."
        ) from error


def list_tasks() -> list[TaskInfo]:
    """All tasks by name; what cannot be used is listed too, with the reason."""
    return [
        _info(name, origin, claim, rivals=claims)
        for name, claims in sorted(_claims().items())
        for origin, claim in claims.items()
    ]


def _info(name: str, origin: str, claim: _Claim, *, rivals: Mapping[str, _Claim]) -> TaskInfo:
    try:
        if len(rivals) > 1:
            raise _duplicate(name, rivals)
        description = str(_load(name, claim).description)
    except TaskError as error:
        return TaskInfo(name=name, description="", origin=origin, broken=str(error))
    except Exception as error:  # a class attribute may be anything
        reason = f"its description cannot be read: {type(error).__name__}: {error}"
        return TaskInfo(name=name, description="", origin=origin, broken=reason)
    return TaskInfo(name=name, description=description, origin=origin)


def _claims() -> dict[str, dict[str, _Claim]]:
    """For every name the claims to it by origin; more than one origin is a conflict."""
    claims: dict[str, dict[str, _Claim]] = {
        name: {_origin(task_class): task_class} for name, task_class in _registered.items()
    }
    for point in entry_points(group=ENTRY_POINT_GROUP):
        # A plug-in may also decorate its class: one origin, one claim.
        claims.setdefault(point.name, {}).setdefault(_place(point), point)
    return claims


def _place(point: EntryPoint) -> str:
    """Where an entry point says its class is; a malformed one cannot be taken apart."""
    match = EntryPoint.pattern.match(point.value)
    return f"{match['module']}:{match['attr']}" if match else point.value


def _load(name: str, claim: _Claim) -> type[Task]:
    if isinstance(claim, type):
        return claim
    package = claim.dist.name if claim.dist is not None else "unknown"
    plug_in = f"Task {name!r} of the package {package!r} ({claim.value})"
    try:
        task_class = claim.load()
    except (Exception, SystemExit) as error:  # a plug-in's import may raise anything, or exit
        raise BrokenTaskError(
            f"{plug_in} fails to import: {type(error).__name__}: {error}. "
            "Update or uninstall the package."
        ) from error
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise BrokenTaskError(f"{plug_in} is not a subclass of lora_fsdp.tasks.Task.")
    if task_class.name != name:
        raise BrokenTaskError(
            f"{plug_in} calls itself {task_class.name!r}: entry point and class need one name."
        )
    return task_class


def _origin(task_class: type[Task]) -> str:
    return f"{task_class.__module__}:{task_class.__qualname__}"


def _duplicate(name: str, origins: Mapping[str, _Claim] | list[str]) -> DuplicateTaskError:
    return DuplicateTaskError(
        f"Two tasks are called {name!r}: {' and '.join(origins)}. "
        "Rename one, or uninstall the package it comes from."
    )
