"""Every `lora-fsdp` command and training of README, docs and help runs, in a folder like a user's.

The model behind every name is a toy, the tables have some dozens of rows, trainings stop after two
steps, and downloads come from a server on this machine. Of a training the launch is asked for its
command line, and what that starts in every process runs here, in one. Those of README and of
`docs/from-1-to-8-gpus.md`, and all of `accelerate launch`, are also launched as they stand. `make
test` runs README's commands and launches two, one with `make` and one with `accelerate`; `make
campaigns` runs all.

`make`, set-up and measurements: test_documented_setup.py. The Chinese README has the English one's
commands (test_documentation.py). What nothing runs is listed with its reason, and what has a test
of its own by that test's name, in support/documented.py.

Run: python -m pytest tests/test_documented_commands.py
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from lora_fsdp.cli import training_process
from lora_fsdp.cli.main import main
from lora_fsdp.failures import FOUND_ERRORS
from lora_fsdp.tasks import registry
from tests.support.checkout import make_checkout, set_up
from tests.support.documented import ROOT, all_commands, commands_of, kind_of, of_kind, words_of
from tests.support.hub import FakeHub, serve
from tests.support.short_trainings import ANEW, changed, launched_words, make_words

LAUNCHED_OF = {c for page in ("README.md", "docs/from-1-to-8-gpus.md") for c in commands_of(page)}
# Of one adapter, and of several.
DONE = ("Adapter, metrics and predictions:", "comparison.html")
SAVED = ["--save_strategy", "steps", "--save_steps", "1"]
RESUME = ["--resume_from_checkpoint", "true"]
# What a command of `doctor` ends with here, where there is no GPU.
ENDS_WITH = {
    "lora-fsdp doctor --config recipe.yaml --accelerate_config fsdp2 --strict": FOUND_ERRORS
}


def is_launched(command: str) -> bool:
    return command in LAUNCHED_OF or command.startswith("accelerate launch")


def is_doctor(command: str) -> bool:
    return command.startswith("lora-fsdp doctor")


TRAININGS = of_kind("training")
LAUNCHED = [c for c in TRAININGS if is_launched(c)]
OFTEN = [c for c in LAUNCHED if c.startswith("make") or "examples/custom_task.py" in c]
RESUMED = [c for c in TRAININGS if " ".join(RESUME) in c]
HERE = [c for c in TRAININGS if c not in OFTEN and c not in RESUMED]
# With what they ask.
FIRST_PAGE = [*commands_of("README.md"), "make sentiment"]


def each(commands: list[str], often: list[str] = FIRST_PAGE) -> pytest.MarkDecorator:
    """A test for each command; `make test` runs those of `often`, and campaigns the others."""
    marked = [pytest.param(c, marks=() if c in often else pytest.mark.slow) for c in commands]
    return pytest.mark.parametrize("command", marked)


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as the commands want it; later ones use what earlier ones made."""
    made = tmp_path_factory.mktemp("checkout")
    make_checkout(made, model_folder)
    set_up(made)
    return made


@pytest.fixture
def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In that folder, with the process as it was when the test is over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of a toy's work the threads of a busy machine make ten times as much
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["lora-fsdp"])
    yield folder
    torch.set_num_threads(threads)


# ---- before a training --------------------------------------------------------------------------


@each([c for c in of_kind("command") if is_doctor(c)])
def test_doctor(command: str, at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words_of(command)[1:]) == ENDS_WITH.get(command, 0), capsys.readouterr().out


# ---- trainings ----------------------------------------------------------------------------------


@pytest.mark.distributed
@each(LAUNCHED, OFTEN)
def test_launched(command: str, folder: Path) -> None:
    done = subprocess.run(
        launched_words(command),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert any(words in done.stdout for words in DONE)


@each(HERE)
def test_in_one_process(command: str, at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command.startswith("accelerate"):
        script, *words = launched_words(command)[6:]
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
    else:
        train(command, [*changed(command), *ANEW], capsys)
    out = capsys.readouterr().out
    assert any(words in out for words in DONE)


@each(RESUMED)
def test_resumed(
    command: str,
    at_home: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a run by the same command without that option, which then loses its last step."""
    caplog.set_level(logging.INFO, logger="lora_fsdp")
    saved = [*SAVED, *(["--eval_steps", "1"] if "--eval_steps" in command else [])]
    train(command, [*changed(command), *saved, "--resume_from_checkpoint", "false", *ANEW], capsys)
    [run] = re.findall(r"Ask it: lora-fsdp predict --adapter (\S+)", capsys.readouterr().out)
    shutil.rmtree(Path(run) / "checkpoint-2")
    train(command, [*changed(command), *saved], capsys)
    assert f"Resuming from {run}/checkpoint-1" in caplog.text
    assert (Path(run) / "checkpoint-2").is_dir()


def train(command: str, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Ask the launch for its command line, and do what it starts in every process."""
    words = words_of(re.sub(r"^nohup (.*?) >>? train\.log 2>&1 &$", r"\1", command))
    if words[0] == "make":
        words = make_words(words)
    assert main([*words[1:], *more, "--dry_run"]) == 0, capsys.readouterr().err
    launch = words_of(capsys.readouterr().out)
    assert Path(launch[launch.index("--config_file") + 1]).is_file()
    module = launch.index(training_process.__name__)
    sys.argv = launch[module:]
    training_process.main()


# ---- everything else ----------------------------------------------------------------------------


@each([c for c in of_kind("command") if not is_doctor(c)])
def test_others(command: str, at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output in (*at_home.glob("answers.*"), *at_home.glob("next.csv")):  # of the page before
        output.unlink()
    if "runs/other" in command and not Path("runs/other").exists():
        shutil.copytree("runs/mine", "runs/other")
    if "adapters/theirs" in command:  # what PEFT alone would have written
        Path("adapters/theirs").mkdir(parents=True, exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(Path("runs/mine", name), "adapters/theirs")
    assert main(words_of(command)[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", of_kind("download"))
def test_downloads(
    command: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a server on this machine in the place of the one that is named, or of the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    words = words_of(command)[1:]
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    with serve(FakeHub(files, name=words[1])) as hub:
        assert main([*words, "--endpoint", hub.address]) == 0
    here = words[-1] if "--output_dir" in words else f"models/{words[1].partition('/')[2]}"
    assert {path.name: path.read_bytes() for path in Path(here).iterdir()} == files


@pytest.mark.parametrize("command", of_kind("shell"))
def test_in_a_shell(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command prints goes to where the line says, in a home that fish has been in."""
    words = words_of(command)
    assert main(words[1 : words.index(">")]) == 0
    printed = capsys.readouterr().out
    (tmp_path / ".config" / "fish" / "completions").mkdir(parents=True)
    shell = f'lora-fsdp() {{ printf %s "$PRINTED"; }}\n{command}'
    home = {**os.environ, "HOME": str(tmp_path), "PRINTED": printed}
    subprocess.run(["bash", "-c", shell], env=home, check=True, timeout=60)
    [script] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert script.read_text() == printed
    assert "max_hours" in printed


def test_every_command_has_a_test_or_a_reason() -> None:
    assert len(OFTEN) == 2
    kinds = [kind_of(command) for command in all_commands()]
    assert {kind for kind in kinds if kind and kind.startswith("tests/")} == {
        "tests/reporting/test_harness.py",
        "tests/serving/test_serve.py",
        "tests/sweeps/test_optuna.py",
        "tests/test_rented_gpu.py",
        "tests/test_serving.py",
    }
    assert kinds.count(None) == 7
    assert kinds.count("command") >= 40
    assert len(TRAININGS) >= 18
