"""Where a run's time goes. Run: python -m pytest tests/training/test_time_spent.py"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_fsdp.training.logging import time_spent
from lora_fsdp.training.logging.time_spent import (
    PARTS,
    STARTED,
    TimeSpent,
    measured,
    process_began,
    seconds_by_part,
    spent_on,
)
from tests.support.tiny import toy_table

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_done_within_another_part_counts_once():
    began = time.perf_counter()
    spent = TimeSpent(before=1.0)
    with spent.on("train"):
        time.sleep(0.05)
        with spent.on("evaluate"):
            time.sleep(0.1)
        time.sleep(0.05)
    time.sleep(0.03)
    found = spent.seconds()
    wall = time.perf_counter() - began
    assert list(found) == list(PARTS)
    assert found["start"] == 1.0
    assert found["train"] == pytest.approx(0.1, abs=0.04)
    assert found["evaluate"] == pytest.approx(0.1, abs=0.04)
    assert found["other"] == pytest.approx(0.03, abs=0.03)
    assert sum(found.values()) == pytest.approx(1.0 + wall, abs=0.01)


def test_a_part_that_fails_ends():
    spent = TimeSpent()
    with pytest.raises(ValueError, match="no"), spent.on("read"):
        raise ValueError("no")
    before = spent.seconds()["read"]
    time.sleep(0.02)
    assert spent.seconds()["read"] == before


def test_without_a_run_nothing_is_counted():
    with spent_on("train"):
        assert seconds_by_part() == {}


@pytest.mark.parametrize(
    ("ago", "counts"), [(30.0, True), (3600.0, False), (-60.0, False), (None, False)]
)
def test_a_run_begins_with_the_command_that_started_it(monkeypatch, ago, counts):
    """Unless that is none of this process's: far older, or younger."""
    import psutil

    own = psutil.Process().create_time()
    told = "tomorrow" if ago is None else str(own - ago)
    monkeypatch.setenv(STARTED, told)
    process_began()
    with measured():
        start = seconds_by_part()["start"]
    expected = time.time() - own + (ago if counts else 0)
    assert start == pytest.approx(expected, abs=1)
    with measured():  # a second run of the process does not start it again
        assert seconds_by_part()["start"] == 0
    assert time_spent._began is None


@pytest.mark.distributed
def test_a_runs_seconds_add_up_to_its_wall_time(model_folder, tmp_path):
    """From the command to the report, in `metrics.json` and on the page."""
    toy_table(60).to_csv(tmp_path / "table.csv", index=False)
    words = ["train", tmp_path / "table.csv", "--task", "classification", "--text_column", "text"]
    words += ["--label_column", "label", "--instruction", "Say how:", "--eval_size", 20]
    words += ["--model_name_or_path", model_folder, "--output_dir", tmp_path / "run"]
    words += ["--lora_target_modules", "all-linear", "--max_steps", 4, "--eval_strategy", "steps"]
    words += ["--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2]
    words += ["--accelerate_config", "single"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.time()
    lines, wall = [], 0.0
    with subprocess.Popen(
        [sys.executable, "-m", "lora_fsdp", *map(str, words)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Report: "):
                wall = time.time() - began
    assert process.returncode == 0, "".join(lines)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds_by_part"]
    assert list(found) == list(PARTS)
    assert sum(found.values()) == pytest.approx(wall, abs=0.5)
    for part in ("start", "read", "score", "train", "evaluate", "save", "report"):
        assert found[part] > 0.005, part
    assert found["capture"] == 0
    assert found["other"] < 0.05 * wall
    shown = json.loads((tmp_path / "run" / "report.json").read_text())["spent"]
    assert [one["part"] for one in shown["parts"]] == [p for p in PARTS if p != "capture"]
    assert sum(one["seconds"] for one in shown["parts"]) == pytest.approx(shown["total"])
    assert sum(one["share"] for one in shown["parts"]) == pytest.approx(1)
    assert shown["total"] <= sum(found.values())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Where the time went" in page


def test_commands_end_without_looking_through_what_they_imported():
    """Their objects are frozen when Python comes to collecting."""
    code = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 1000))\n"
        "from lora_fsdp.cli.main import main\n"
        "sys.exit(main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "frozen True"


def test_the_launcher_imports_no_models_before_its_first_line():
    """Seconds of it: what a launch needs to know stands in a YAML."""
    code = (
        "import sys\n"
        "from lora_fsdp.cli.main import main\n"
        "main(['train', '--dry_run', '--accelerate_config', 'single'])\n"
        "print(sorted({'transformers', 'peft', 'sklearn', 'trl'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
