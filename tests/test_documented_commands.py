"""Every command of README and docs runs, as it stands there, in a folder like a user's.

The model behind every name is a toy, the tables have some dozens of rows, and trainings stop after
two steps. What cannot run here is listed with the reason. The Chinese README has the English one's
commands (`test_documentation.py`); `docs/rented-gpu.md` and `docs/serving.md` have tests of their
own.

Run: python -m pytest tests/test_documented_commands.py
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from lora_fsdp.cli.main import main
from tests.test_documentation import ROOT, blocks

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
OWN_TESTS = {"docs/rented-gpu.md", "docs/serving.md", "docs/commands.md"}
NOT_RUN = {
    r"lora-fsdp download ": "needs the Hub; tests/cli/test_download.py has a server of its own",
    r"export PIP_INDEX_URL|PIP_INDEX_URL=|PYTHON=|source |make (sentiment|test)$": "sets up",
    r"python -m (benchmarks|tests)\.": "needs a GPU, or hours",
    r"--resume_from_checkpoint true$": "an option to add",
}
SHORT = ["--max_steps", "2"]


def commands_of(page: str) -> list[str]:
    """The page's commands, each on one line."""
    text = "\n".join(block for kind in ("bash", "sh") for block in blocks(ROOT / page, kind))
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and line[0] != "#"]


def all_commands() -> list[str]:
    """Of all pages, each once, in order: later ones use what earlier ones made."""
    found = [command for page in PAGES if page not in OWN_TESTS for command in commands_of(page)]
    found = [c for c in dict.fromkeys(found) if not any(re.match(r, c) for r in NOT_RUN)]
    # Of the trainings into one folder, last the one whose adapter the pages go on with.
    return sorted(found, key=lambda c: (not is_training(c), "custom_task" not in c))


def is_training(command: str) -> bool:
    return command.startswith(("accelerate launch", "lora-fsdp train", "make sentiment"))


COMMANDS = all_commands()


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """A checkout as the commands want it."""
    made = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "accelerate_configs", "lora_fsdp"):
        (made / name).symlink_to(ROOT / name)
    for name in (
        ".cache/default/smollm2-135m-instruct",
        "models/SmolLM2-135M-Instruct",
        "models/deepseek-llm-7b-base",
    ):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model_folder, made / name)
    tweets = pd.DataFrame(
        {
            "text": [f"flight {n} was {'late and bad' if n % 2 else 'good'}" for n in range(60)],
            "sentiment": ["negative" if n % 2 else "positive" for n in range(60)],
        }
    )
    teams = ["billing", "delivery", "technical"]
    tickets = pd.DataFrame(
        {
            "message": [f"help with the {teams[n % 3]} of order {n}" for n in range(60)],
            "team": [teams[n % 3] for n in range(60)],
        }
    )
    for name, table in (("tweets", tweets), ("tickets", tickets)):
        table.to_csv(made / f"{name}.csv", index=False)
    tweets.head(5).to_csv(made / "new.csv", index=False)
    tickets.head(5).to_csv(made / "new_tickets.csv", index=False)
    tweets.to_csv(made / ".cache" / "default" / "airline_tweets.csv", index=False)
    (made / "recipe.yaml").write_text(
        "model_name_or_path: models/SmolLM2-135M-Instruct\ntask: sentiment\ndata_file: tweets.csv\n"
    )
    return made


def training_words(command: str) -> list[str]:
    """The words of a training, cut short; each into a folder of its own unless it names one."""
    words = shlex.split(command)
    if words[0] == "make":  # what the Makefile does with ARGS
        arguments = shlex.split(words[2].removeprefix("ARGS="))
        words = ["lora-fsdp", "train", "--config", "examples/recipes/sentiment-default.yaml"]
        words += arguments
    if "deepseek-7b" in command:  # the recipe names the Hub's model, and this machine has no GPU
        words += ["--model_name_or_path", "models/deepseek-llm-7b-base"]
        config = "accelerate_configs/fsdp2_cpu.yaml"
        words = [config if word == "accelerate_configs/fsdp2.yaml" else word for word in words]
    if "--eval_steps" in words:
        words += ["--eval_steps", "2", "--save_steps", "2"]
    if "recipe.yaml" in words:  # the doctor of the same page wants its folder free
        words += ["--output_dir", "runs/from-recipe"]
    # A token is a letter here, and a question with its choices is never cut.
    words += ["--max_length", "512" if "multiple-choice" in command else "96"]
    programs = {"lora-fsdp": "lora_fsdp", "accelerate": "accelerate.commands.accelerate_cli"}
    overwrite = ["--overwrite_output_dir", "true"]
    return [sys.executable, "-m", programs[words[0]], *words[1:], *SHORT, *overwrite]


@pytest.mark.parametrize("command", [c for c in COMMANDS if is_training(c)])
def test_training(command, folder):
    done = subprocess.run(
        training_words(command),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "Adapter, metrics and predictions:" in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if not is_training(c)])
def test_others(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "answers.csv").unlink(missing_ok=True)  # of the page before
    program, *words = shlex.split(command)
    assert program == "lora-fsdp", "a command that nothing runs: give it a test or a reason"
    assert main(words) == 0, capsys.readouterr().err


def test_there_are_commands():
    assert sum(map(is_training, COMMANDS)) >= 5
    assert len(COMMANDS) >= 12
