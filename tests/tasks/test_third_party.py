"""A third party's package with a task, installed by pip, is known to every command.

Run: python -m pytest tests/tasks/test_third_party.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The whole package: two files, under 30 lines.
PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "riddle-task"
version = "1.0"

[tool.setuptools]
py-modules = ["riddle_task"]

[project.entry-points."lora_fsdp.tasks"]
riddle = "riddle_task:RiddleTask"
"""
MODULE = """\
from lora_fsdp import GenerationTask


class RiddleTask(GenerationTask):
    name = "riddle"
    description = "The answer to a riddle"
    instruction = "Solve the riddle."
    text_column = "riddle"
    label_column = "solution"
"""
RIDDLES = """\
riddle,solution
What has keys and opens no door?,a piano
What has a neck and no head?,a bottle
What gets wetter the more it dries?,a towel
What has hands and cannot clap?,a clock
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip installed the package, offline."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "riddle_task.py").write_text(MODULE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, *offline, str(source)], check=True)
    return site


def lora_fsdp(site: Path, *words: str) -> str:
    places = os.pathsep.join([str(ROOT), str(site)])
    done = subprocess.run(
        [sys.executable, "-m", "lora_fsdp", *words],
        env={**os.environ, "PYTHONPATH": places},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_the_package_is_short() -> None:
    assert len(f"{PYPROJECT}{MODULE}".splitlines()) < 30


def test_its_task_is_listed(site: Path) -> None:
    listed = {task["name"]: task for task in json.loads(lora_fsdp(site, "tasks", "list", "--json"))}
    assert listed["riddle"]["description"] == "The answer to a riddle"
    assert listed["riddle"]["origin"] == "riddle_task:RiddleTask"
    assert listed["riddle"]["broken"] is None


def test_its_task_is_checked_on_a_table(site: Path, tmp_path: Path) -> None:
    (tmp_path / "riddles.csv").write_text(RIDDLES)
    options = ["--task", "riddle", "--eval_size", "1"]
    shown = lora_fsdp(site, "tasks", "check", str(tmp_path / "riddles.csv"), *options)
    assert "Instruction: Solve the riddle.\nInput: What has keys and opens no door?" in shown
    assert "[ a piano]" in shown
