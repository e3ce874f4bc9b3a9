"""The pages' set-up lines, and their measurements in a small form.

`make` says what it would run and runs none of it (`--dry-run`): really run, it downloads gigabytes,
which CI does. So does pip, which is run where `--installs` says so, as in CI. A measurement is
called in this process by the program that the page names, with the page's words where they are not
its size; `benchmarks.planning`, which needs a GPU, is in no block.

Run: python -m pytest tests/test_documented_setup.py
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import benchmarks.throughput
from tests.support.checkout import make_checkout
from tests.support.documented import ROOT, of_kind, words_of
from tests.support.installed import build_wheel, environment_of, install_beside_dependencies

MADE = [command for command in of_kind("set-up") if re.search(r"\bmake\b", command)]
INDEX = [command for command in of_kind("set-up") if "PIP_INDEX_URL" in command]
OTHERS = set(of_kind("set-up")) - {*MADE, *INDEX}


def in_bash(command: str, folder: Path, *programs: Path) -> str:
    """What a shell prints that finds these folders' programs first."""
    path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment | {"PATH": path},
        check=True,
        text=True,
        capture_output=True,
        timeout=120,
    ).stdout


# ---- set-up -------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout in which nothing was set up."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.parametrize("command", ["make sentiment", *MADE])
def test_make_sets_up_what_is_not_there(command: str, bare: Path) -> None:
    said = in_bash(command.replace("make", "make --dry-run"), bare)
    python = re.search(r"PYTHON=(\S+)", command)
    torch_version = re.search(r"^torch==.*", (bare / "constraints.txt").read_text(), re.MULTILINE)
    assert torch_version is not None
    steps = [
        f"\n{python[1] if python else 'python3'} -m venv .venv",
        f"-c constraints.txt {torch_version[0]}\n",
        "-c constraints.txt -e '.[demo,test]'\n",
        ".venv/bin/lora-fsdp demo --prepare_only\n",
        "exec .venv/bin/lora-fsdp train",
    ]
    places = [said.find(step) for step in steps]
    assert -1 not in places, said
    assert places == sorted(places)
    assert not (bare / ".venv").exists()


@pytest.mark.parametrize("command", INDEX)
def test_pip_takes_the_index(command: str, tmp_path: Path) -> None:
    """Asked for its settings in the place of what `make` would install."""
    line = f"{sys.executable} -m pip config list"
    shown = command.replace("make sentiment", line) if "make" in command else f"{command}\n{line}"
    address = re.search(r"https://\S+", command)
    assert address is not None
    assert f":env:.index-url='{address[0]}'" in in_bash(shown, tmp_path)


def test_environment(tmp_path: Path) -> None:
    """Made and entered; then the line that looks for GPUs, which torch's own Python runs."""
    make, enter = "python3 -m venv .venv", "source .venv/bin/activate"
    [look] = OTHERS - {make, enter}
    python = (tmp_path / "python3").absolute()
    python.symlink_to(sys.executable)
    in_bash(f"{make} --without-pip", tmp_path, tmp_path)
    found = in_bash(f"{enter} && command -v python", tmp_path).strip()
    assert found == str(tmp_path / ".venv" / "bin" / "python")
    printed = in_bash(look, tmp_path, Path(sys.executable).parent)
    assert printed.split() == [str(torch.cuda.is_available()), str(torch.cuda.device_count())]


@pytest.mark.slow
def test_packages(request: pytest.FixtureRequest, bare: Path) -> None:
    """Into an environment of their own, in the pages' order; then what they bring is there."""
    if not request.config.getoption("--installs"):
        pytest.skip("downloads packages: --installs")
    shutil.copytree(ROOT / "lora_fsdp", bare / "lora_fsdp")
    shutil.copy(ROOT / "README.md", bare)
    (bare / "wheel").mkdir()
    (bare / "elsewhere").mkdir()
    wheel = build_wheel(bare / "wheel")
    lines = [
        "set -e",
        f"{shlex.quote(sys.executable)} -m venv .venv",
        "source .venv/bin/activate",
        *of_kind("packages"),
        "lora-fsdp tasks list",
        "transformers serve --help",
        "pip uninstall --quiet --yes lora-fsdp",
        f"pip install -c constraints.txt '{wheel}[4bit,demo,excel,rouge,serve]'",
        "pip check",
        "cd elsewhere",
        "python -c 'import bitsandbytes, gguf, openpyxl, rouge_score, starlette, uvicorn'",
        *SHIPPED,
        "lora-fsdp --help",
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        # A checkout on it would be an installation to pip.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=bare, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Successfully installed" in done.stdout
    assert "sentiment" in done.stdout
    assert "Usage: transformers serve" in done.stdout
    assert "No broken requirements found." in done.stdout


# What is inside the package: a recipe, its table, an accelerate YAML.
SHIPPED = [
    'python -c "from importlib.resources import files; '
    f"assert files('lora_fsdp').joinpath('{file}').is_file()\""
    for file in (
        "examples/recipes/rating.yaml",
        "examples/data/reviews.csv",
        "accelerate_configs/fsdp2.yaml",
        "reporting/templates/style.css",
        "py.typed",
    )
]


@pytest.mark.slow
@pytest.mark.distributed
def test_wheel_outside_the_checkout(model_folder: Path, tmp_path: Path) -> None:
    """Each first command, in a folder without anything of the project; the default is a toy."""
    (tmp_path / "built").mkdir()
    programs = install_beside_dependencies(build_wheel(tmp_path / "built"), tmp_path / "installed")
    here = tmp_path / "elsewhere"
    prepared = here / ".cache" / "default"
    shutil.copytree(model_folder, prepared / "smollm2-135m-instruct")
    rows = "".join(f"flight {n} was {n % 3},{'abc'[n % 3]}\n" for n in range(60))
    (here / "tickets.csv").write_text(f"message,team\n{rows}")
    for letter, label in zip("abc", ("negative", "neutral", "positive"), strict=True):
        rows = rows.replace(f",{letter}\n", f",{label}\n")
    (prepared / "airline_tweets.csv").write_text(f"text,sentiment\n{rows}")
    lines = [
        "set -ex",
        *SHIPPED,
        "lora-fsdp --help",
        "lora-fsdp plan --config rating --gpus 1xH100",
        "lora-fsdp doctor --config rating",
        "lora-fsdp init tickets.csv",
        "lora-fsdp train --config rating --max_steps 1",
        "lora-fsdp demo --max_steps 1 --accelerate_config single",
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=here, env=environment_of(programs), text=True, timeout=900, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert str(ROOT) not in done.stdout
    for made in ("tickets.yaml", "runs/rating/report.html", "runs/sentiment/report.html"):
        assert (here / made).is_file(), done.stdout


# ---- measurements -------------------------------------------------------------------------------

# In the place of the page's words that say how large it is.
SMALL = {
    "tests.fuzz.campaign": ["--inputs", "26", "--seed", "600000"],
    "tests.hygiene.long_run": ["100"],
    "tests.faults.campaign": ["--kills", "1", "--launched", "0", "--seed", "10"],
    "benchmarks.adapters": [
        "--model",
        "tiny",
        "--dtype",
        "float32",
        "--adapters",
        "2",
        "--examples",
        "2",
        "--steps",
        "1",
    ],
    "benchmarks.coverage": ["--splits", "2"],
    "benchmarks.loading": ["--ways", "stream", "--times", "1"],
    "benchmarks.quality": [
        *("--model", "models/SmolLM2-135M-Instruct", "--table", "tweets.csv", "--device", "cpu"),
        *("--rows", "12", "--held_out", "6", "--max_steps", "1", "--arms", "default"),
        *("--seeds", "1", "--output", "quality.json"),
    ],
    "benchmarks.throughput": [
        "--model",
        "tiny",
        "--examples",
        "2",
        "--steps",
        "2",
        "--arms",
        "ours-eager",
    ],
}
SAYS = {
    "tests.fuzz.campaign": "26 inputs, 0 failed",
    "tests.hygiene.long_run": "host memory: ",
    "tests.faults.campaign": "unequal ends: 0",
    "benchmarks.adapters": " 2 x  turns ",
    "benchmarks.coverage": "sets of 95%: mean coverage 0.9",
    "benchmarks.loading": '{"way": "stream", "seconds": ',
    "benchmarks.quality": "default ",
    "benchmarks.throughput": '"gradients_agree": true',
}


@pytest.fixture
def at_home(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In a user's folder, with results and scratch in it."""
    make_checkout(tmp_path, model_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(benchmarks.throughput, "RESULTS", tmp_path / "results")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of a toy's work the threads of a busy machine make ten times as much
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if "throughput" in command else ())
        for command in of_kind("measurement")
    ],
)
@pytest.mark.slow
def test_measurement(
    command: str,
    at_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, _, name, *words = words_of(command)
    if name == "benchmarks.loading":  # its words say what is measured
        small = [*words, *SMALL[name]]
    elif words == ["--list"]:
        small = words
    else:
        small = SMALL[name]
        assert set(words) & set(small) or name == "tests.hygiene.long_run"
    monkeypatch.setattr(sys, "argv", [name, *small])
    try:
        code = importlib.import_module(name).main()
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr().out
    assert not code, printed
    assert SAYS[name] in printed


@pytest.mark.parametrize("way", ["read", "stream", "from_pretrained"])
def test_every_way_of_loading(
    way: str, at_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.loading import main

    monkeypatch.setattr(sys, "argv", ["loading", "models/base", "--way", way])
    main()
    assert '{"seconds": ' in capsys.readouterr().out
