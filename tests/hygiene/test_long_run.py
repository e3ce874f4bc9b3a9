"""A run's process does not grow.

Run: python -m pytest tests/hygiene (2,000 steps: python -m tests.hygiene.long_run 2000)
"""

import threading

import psutil
import pytest
from transformers import TrainerCallback

from tests.hygiene.long_run import long_run
from tests.support.ranks import run_ranks

STEPS = 200
# Of 200 steps; a tensor of 64 KiB kept every step would be 64.
MOST_MIB_A_THOUSAND_STEPS = 20


class Leak(TrainerCallback):
    """Keeps 64 KiB and an open file every step."""

    def __init__(self):
        self.kept = []

    def on_step_end(self, args, state, control, **kwargs):
        self.kept.append((b"x" * 2**16, open(__file__)))  # noqa: SIM115


def leaking_run(folder):
    return long_run(folder, 60, every=5, callbacks=[Leak()])


def plain_run(folder):
    return long_run(folder, STEPS, every=20)


@pytest.mark.slow
@pytest.mark.distributed
class TestGrowth:
    def test_memory_files_threads_and_children_stay(self, tmp_path):
        [grown] = run_ranks(plain_run, tmp_path, world_size=1)
        assert grown["slope"] < MOST_MIB_A_THOUSAND_STEPS
        for name in ("files", "threads", "children"):
            assert grown[name][0] == grown[name][1], name

    def test_a_leak_is_seen(self, tmp_path):
        """The measurement itself: it must find what it is for."""
        [grown] = run_ranks(leaking_run, tmp_path, world_size=1)
        assert grown["slope"] > 2 * MOST_MIB_A_THOUSAND_STEPS
        assert grown["files"][1] > grown["files"][0] + 20


def two_runs(folder):
    """Files, Python's threads and children after one run and after a second, in one process."""
    process, seen = psutil.Process(), []
    for number in range(2):
        long_run(folder / str(number), 20, every=5)
        names = sorted(thread.name for thread in threading.enumerate())
        seen.append((process.num_fds(), names, len(process.children())))
    return seen


def test_a_run_leaves_no_thread_or_file_behind(tmp_path):
    [(first, second)] = run_ranks(two_runs, tmp_path, world_size=1)
    assert second[1:] == first[1:] == (["MainThread"], 0)
    assert second[0] <= first[0]
