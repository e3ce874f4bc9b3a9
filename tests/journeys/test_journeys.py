"""A stranger follows each tutorial: its commands, in its order, from the installed wheel.

The reader's tables are some dozens of rows, the small model that the page prepares is a toy, and
nothing else is changed: a shell runs the lines as they stand, in a folder with nothing but the
tables. With LORA_FSDP_JOURNEYS=FOLDER each journey's terminal output and report stay there, to be
looked at; with LORA_FSDP_PROGRAMS=venv/bin the journeys go through an environment that is there.

Run: python -m pytest -m slow tests/journeys
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from tests.support.documented import commands_of
from tests.support.installed import (
    build_wheel,
    environment_of,
    install_beside_dependencies,
)
from tests.support.readers_tables import write_readers_tables

# What a journey ends with: the table of answers, and columns that it has.
JOURNEYS = {
    "docs/tickets.md": ("answers.xlsx", {"message", "predicted_label", "probability/billing"}),
    "docs/sentiment.md": ("answers.csv", {"comment", "predicted_label", "probability/neutral"}),
    "docs/ratings.md": ("answers.csv", {"review", "predicted_score", "expected_score"}),
    "docs/many-labels.md": ("answers.csv", {"text", "predicted_labels", "yes/delivery"}),
    "docs/several-questions.md": ("answers.csv", {"answer/mood", "expected/stars"}),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("LORA_FSDP_PROGRAMS")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("installed")
    return install_beside_dependencies(build_wheel(folder), folder / "environment")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("page", JOURNEYS)
def test_a_tutorial_leads_to_answers(
    page: str, programs: Path, model_folder: Path, tmp_path: Path
) -> None:
    here = tmp_path / "my folder"  # with a blank in its name
    here.mkdir()
    write_readers_tables(here)
    prepared = here / ".cache" / "default"
    shutil.copytree(model_folder, prepared / "smollm2-135m-instruct")
    (prepared / "airline_tweets.csv").write_text("text,sentiment\n")
    said = ""
    try:
        for command in commands_of(page):
            if command.startswith("pip install"):
                continue
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=here, env=environment_of(programs), text=True, timeout=400, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            said += f"$ {command}\n{done.stdout}\n"
            assert done.returncode == 0, said
    finally:
        keep(Path(page).stem, said, here)
    assert "Traceback" not in said
    assert str(Path.cwd()) not in said  # the checkout
    file, columns = JOURNEYS[page]
    answers = (
        pd.read_excel(here / file)
        if file.endswith("xlsx")
        else pd.read_csv(here / file, sep=None, engine="python")
    )
    assert columns <= set(answers.columns)
    assert len(answers) == 5
    reports = list(here.glob("runs/*/report.html"))
    assert len(reports) == len([c for c in commands_of(page) if c.startswith("lora-fsdp train")])


def keep(name: str, said: str, here: Path) -> None:
    """Terminal output and reports, where they are asked for."""
    if not os.environ.get("LORA_FSDP_JOURNEYS"):
        return
    folder = Path(os.environ["LORA_FSDP_JOURNEYS"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "terminal.txt").write_text(said, encoding="utf-8")
    for report in here.glob("runs/*/report.html"):
        shutil.copy(report, folder / f"{report.parent.name}.html")
    for answers in here.glob("answers.*"):
        shutil.copy(answers, folder)
