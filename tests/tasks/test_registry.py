"""Tasks by name and by entry point. Run: python -m pytest tests/tasks/test_registry.py"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_fsdp.errors import (
    ArgumentError,
    BrokenTaskError,
    DuplicateTaskError,
    IncompleteTaskError,
    UnknownTaskError,
)
from lora_fsdp.tasks import (
    ClassificationTask,
    SentimentTask,
    Task,
    TaskInfo,
    get_task,
    list_tasks,
    register_task,
    registry,
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


class Plugins:
    """Distributions in a folder on `sys.path`, as pip would install them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, package: str, *, code: str, tasks: dict[str, str]) -> None:
        (self.folder / f"{package}.py").write_text(code)
        metadata = self.folder / f"{package}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0")
        lines = [f"{name} = {target}" for name, target in tasks.items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[lora_fsdp.tasks]", *lines]))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    monkeypatch.syspath_prepend(tmp_path)
    # What the plug-ins import is forgotten after the test: the next one has other files.
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return Plugins(tmp_path)


CODE = """
from lora_fsdp.tasks import ClassificationTask

class MoodTask(ClassificationTask):
    name = "mood"
    description = "Moods."
"""


def info_of(name: str) -> list[TaskInfo]:
    return [info for info in list_tasks() if info.name == name]


def test_built_in_tasks_are_there() -> None:
    assert type(get_task("classification")) is ClassificationTask
    assert type(get_task("sentiment")) is SentimentTask
    (info,) = info_of("sentiment")
    assert info.origin == "lora_fsdp.tasks.sentiment:SentimentTask"
    assert info.description == SentimentTask.description
    assert info.broken is None


def test_options_reach_the_constructor_and_none_does_not() -> None:
    task = get_task("sentiment", {"text_column": "tweet", "instruction": None})
    assert isinstance(task, SentimentTask)
    assert task.text_column == "tweet"
    assert task.instruction == SentimentTask.instruction


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"'sentiment'.*'colour'.*text_column"):
        get_task("sentiment", {"colour": "red"})


def test_task_without_constructor_takes_no_options() -> None:
    @register_task
    class PlainTask(Task):
        name = "plain"

    assert type(get_task("plain", {"labels": None})) is PlainTask
    with pytest.raises(ArgumentError, match=r"'labels'.*options: none"):
        get_task("plain", {"labels": ["a"]})


def test_unknown_task_suggests_the_nearest() -> None:
    with pytest.raises(UnknownTaskError) as caught:
        get_task("sentimant")
    assert "No task 'sentimant'" in str(caught.value)
    assert "Did you mean 'sentiment'?" in str(caught.value)
    assert "classification, " in str(caught.value)


def test_same_class_may_be_registered_again() -> None:
    assert register_task(SentimentTask) is SentimentTask


def test_class_defined_again_replaces_the_former() -> None:
    def run_notebook_cell() -> type[Task]:
        @register_task
        class CellTask(Task):
            name = "cell"

        return CellTask

    run_notebook_cell()
    latest = run_notebook_cell()
    assert type(get_task("cell")) is latest


def test_duplicate_names_both_origins() -> None:
    class OtherTask(Task):
        name = "sentiment"

    with pytest.raises(DuplicateTaskError) as caught:
        register_task(OtherTask)
    assert "lora_fsdp.tasks.sentiment:SentimentTask" in str(caught.value)
    assert "OtherTask" in str(caught.value)


def test_what_is_no_named_task_cannot_be_registered() -> None:
    class NamelessTask(Task):
        pass

    with pytest.raises(IncompleteTaskError, match="NamelessTask has no name"):
        register_task(NamelessTask)
    with pytest.raises(IncompleteTaskError, match="subclass of Task"):
        register_task(dict)  # type: ignore[type-var]


def test_entry_point_is_loaded_when_asked_for(plugins: Plugins) -> None:
    plugins.install("mood_plugin", code=CODE, tasks={"mood": "mood_plugin:MoodTask"})
    get_task("sentiment")
    assert "mood_plugin" not in sys.modules
    assert isinstance(get_task("mood"), ClassificationTask)
    assert info_of("mood") == [TaskInfo("mood", "Moods.", "mood_plugin:MoodTask")]


def test_plug_in_may_register_its_class_too(plugins: Plugins) -> None:
    code = CODE + "\nfrom lora_fsdp.tasks import register_task\nregister_task(MoodTask)\n"
    plugins.install("mood_plugin", code=code, tasks={"mood": "mood_plugin:MoodTask"})
    get_task("mood")
    assert get_task("mood").name == "mood"
    assert len(info_of("mood")) == 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("", "AttributeError"),
        ("MoodTask = dict", "not a subclass"),
        (CODE.replace('"mood"', '"spirits"'), "calls itself 'spirits'"),
    ],
)
def test_broken_plug_in_is_listed_and_raises(plugins: Plugins, code: str, reason: str) -> None:
    plugins.install("mood_plugin", code=code, tasks={"mood": "mood_plugin:MoodTask"})
    (info,) = info_of("mood")
    assert info.broken is not None
    assert reason in info.broken
    assert info.origin == "mood_plugin:MoodTask"
    with pytest.raises(BrokenTaskError) as caught:
        get_task("mood")
    assert reason in str(caught.value)
    assert "package 'mood_plugin'" in str(caught.value)


def test_two_plug_ins_of_one_name(plugins: Plugins) -> None:
    plugins.install("first_plugin", code=CODE, tasks={"mood": "first_plugin:MoodTask"})
    plugins.install("second_plugin", code=CODE, tasks={"mood": "second_plugin:MoodTask"})
    with pytest.raises(DuplicateTaskError) as caught:
        get_task("mood")
    assert "first_plugin:MoodTask" in str(caught.value)
    assert "second_plugin:MoodTask" in str(caught.value)
    assert [info.broken for info in info_of("mood")] == [str(caught.value)] * 2


def test_plug_in_cannot_take_a_built_in_name(plugins: Plugins) -> None:
    plugins.install("thief", code=CODE, tasks={"sentiment": "thief:MoodTask"})
    with pytest.raises(DuplicateTaskError, match="thief:MoodTask"):
        get_task("sentiment")
