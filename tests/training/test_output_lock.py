"""Two jobs do not write into one folder.

Run: python -m pytest tests/training/test_output_lock.py
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lora_fsdp import FineTuningArguments
from lora_fsdp.errors import OutputFolderInUseError
from lora_fsdp.pipeline import claim_output_folder
from lora_fsdp.training.output_lock import (
    LOCK_FILE,
    refuse_folder_in_use,
    release_output_lock,
    take_output_lock,
)

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from lora_fsdp.training.output_lock import take_output_lock
take_output_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another job that holds `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_running_job_is_named(holder, tmp_path):
    arguments = FineTuningArguments(output_dir=str(tmp_path), overwrite_output_dir=True)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(OutputFolderInUseError, match=f"process {holder.pid} on "):
        claim_output_folder(arguments)
    assert (tmp_path / "metrics.json").exists()


def test_a_killed_jobs_lock_is_stale(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    refuse_folder_in_use(tmp_path)
    take_output_lock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    release_output_lock(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_reused_process_number_is_stale(holder, tmp_path):
    file = tmp_path / LOCK_FILE
    owner = json.loads(file.read_text())
    file.write_text(json.dumps({**owner, "started": owner["started"] - 3600}))
    refuse_folder_in_use(tmp_path)


def test_another_machines_lock_is_believed(tmp_path):
    take_output_lock(tmp_path)
    file = tmp_path / LOCK_FILE
    owner = json.loads(file.read_text())
    file.write_text(json.dumps({**owner, "host": "elsewhere"}))
    with pytest.raises(OutputFolderInUseError, match=r"on elsewhere.*remove .*run\.lock"):
        refuse_folder_in_use(tmp_path)
    release_output_lock(tmp_path)
    assert file.exists()


@pytest.mark.parametrize("contents", ["", "{", "[1]", '{"pid": 1}'])
def test_a_damaged_lock_is_stale(tmp_path, contents):
    (tmp_path / LOCK_FILE).write_text(contents)
    take_output_lock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == socket.gethostname()


def test_one_process_may_run_twice(tmp_path):
    """In a notebook, after an error."""
    arguments = FineTuningArguments(output_dir=str(tmp_path))
    claim_output_folder(arguments)
    claim_output_folder(arguments)


def test_it_goes_away_with_its_process(tmp_path):
    program = HOLDER.replace("time.sleep(600)", "")
    subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
        capture_output=True,
    )
    assert not (tmp_path / LOCK_FILE).exists()
