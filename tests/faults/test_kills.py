"""Real runs killed once or twice, resumed, and compared to the bit with one never stopped.

Run: python -m pytest tests/faults/test_kills.py. The long form: python -m tests.faults.campaign
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lora_fsdp.adapter.folder import ADAPTER_FILE
from lora_fsdp.training.saving.checkpoints import find_damage, list_checkpoints
from lora_fsdp.training.watching.interruption import EXIT_CODE
from tests.faults.attempts import ForkedAttempt, LaunchedAttempt, log_of, send
from tests.faults.toy_run import RESULT

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prctl"),
]
SECONDS = 240.0


def wait_for(condition, attempt):
    until = time.monotonic() + SECONDS
    while not condition():
        assert attempt.exit_code() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.001)


def saved(folder, number):
    return len(list_checkpoints(folder)) >= number


def finish(folder, variant, world_size):
    attempt = ForkedAttempt(folder, variant, world_size=world_size)
    assert attempt.wait(SECONDS) == []
    assert attempt.exit_code() == 0, log_of(folder).read_text()[-3000:]
    return json.loads((folder / RESULT).read_text()), (folder / ADAPTER_FILE).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return finish(folder, "steps", 2)


def test_killed_between_steps_while_saving_and_by_sigterm(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    attempt = ForkedAttempt(folder, "steps", world_size=2)
    wait_for(lambda: saved(folder, 1), attempt)
    os.kill(attempt.ranks()[1], signal.SIGKILL)
    assert attempt.wait(60) == []  # its peer does not hang

    attempt = ForkedAttempt(folder, "steps", world_size=2)
    before = list_checkpoints(folder)
    wait_for(lambda: any(folder.glob("*.partial")), attempt)
    for rank in attempt.ranks():
        send(rank, signal.SIGKILL)
    assert attempt.wait(60) == []
    assert find_damage(before[0]) is None or list_checkpoints(folder)[0] != before[0]

    logged = log_of(folder).read_text().count("step ")
    attempt = ForkedAttempt(folder, "steps", world_size=2)
    wait_for(lambda: log_of(folder).read_text().count("step ") > logged, attempt)
    os.kill(attempt.ranks()[0], signal.SIGTERM)
    assert attempt.wait(60) == []
    assert attempt.exit_code() == EXIT_CODE
    assert find_damage(list_checkpoints(folder)[0]) is None

    assert finish(folder, "steps", 2) == uninterrupted
    assert find_damage(folder) is None  # the final adapter's own marker
    assert not list(folder.glob("*.partial"))


@pytest.mark.slow
def test_ranks_end_with_their_launcher(tmp_path):
    folder = tmp_path / "run"
    attempt = LaunchedAttempt(folder, "steps", world_size=2)
    wait_for(lambda: saved(folder, 1), attempt)
    os.kill(attempt.launcher(), signal.SIGKILL)
    assert attempt.wait(60) == []
    assert not (folder / RESULT).exists()
    assert find_damage(list_checkpoints(folder)[0]) is None


@pytest.mark.slow
def test_launcher_passes_sigterm_on(tmp_path):
    folder = tmp_path / "run"
    attempt = LaunchedAttempt(folder, "steps", world_size=1)
    wait_for(lambda: "step 3/15" in log_of(folder).read_text(), attempt)
    send(attempt.launcher(), signal.SIGTERM)
    assert attempt.wait(60) == []
    assert "Training stopped after step" in log_of(folder).read_text()
    assert find_damage(Path(list_checkpoints(folder)[0])) is None
