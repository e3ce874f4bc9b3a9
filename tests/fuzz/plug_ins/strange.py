"""Plug-ins that are no tasks, or fail when they are used."""

import sys

from lora_fsdp.tasks import ClassificationTask, Task


class NotATask:
    """No task."""


class Unnamed(Task):
    """Without a name."""


class RaisesWhenMade(ClassificationTask):
    """Fails in its constructor."""

    name = "fuzzed"

    def __init__(self):
        raise KeyError("no such thing")


class ExitsWhenMade(ClassificationTask):
    """Ends the program in its constructor."""

    name = "fuzzed"

    def __init__(self):
        sys.exit(4)


class _Raising:
    def __get__(self, instance, owner):
        raise ValueError("no description")


class RaisesOnDescription(ClassificationTask):
    """Fails when its description is read."""

    name = "fuzzed"
    description = _Raising()


def FUNCTION():
    """A function."""
