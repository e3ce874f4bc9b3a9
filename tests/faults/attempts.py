"""One start of a toy run as real processes that can be killed: forked ranks, or a launcher's."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

from tests.faults import toy_run
from tests.support.ranks import CONFIGS, launch_environment, start_ranks

SCRIPT = Path(toy_run.__file__)
# Until a rank is told that its peer is gone, and from then until it is killed (as torchrun does).
PEER_SECONDS = 10.0
LAUNCHER_SECONDS = 30.0
_MARK = "LORA_FSDP_FAULTS"


class Attempt(ABC):
    """A start of the run; ranks and launcher are killed by their process ids.

    Attributes:
        told: ranks that had to be ended because a peer was gone, where no launcher does that.
    """

    told = 0

    @abstractmethod
    def ranks(self) -> list[int]:
        """Process ids of the ranks that are there."""

    @abstractmethod
    def launcher(self) -> int | None:
        """Process id of the launcher, if there is one."""

    @abstractmethod
    def running(self) -> list[int]:
        """Process ids of everything that this start began and that has not ended."""

    @abstractmethod
    def exit_code(self) -> int | None:
        """The worst exit code of what was started; `None` while it runs."""

    def wait(self, seconds: float) -> list[int]:
        """Wait until nothing is left; the process ids of what had to be ended after so long."""
        until = time.monotonic() + seconds
        while (left := self.running()) and time.monotonic() < until:
            time.sleep(0.1)
        for pid in left:
            send(pid, signal.SIGKILL)
        return left


class ForkedAttempt(Attempt):
    """Ranks forked from a server that has imported everything: a start takes a second."""

    def __init__(self, folder: Path, variant: str, *, world_size: int) -> None:
        environment = launch_environment("fsdp2_cpu.yaml") if world_size > 1 else {}
        # The pipes are kept: a rank that finds its closed fails at its end.
        self._processes, self._pipes = start_ranks(
            logged_run, str(folder), variant, world_size=world_size, environment=environment
        )
        self._seen: set[int] = set()

    def ranks(self) -> list[int]:
        """As in `Attempt`."""
        return [int(process.pid or 0) for process in self._processes if process.is_alive()]

    def launcher(self) -> int | None:
        """As in `Attempt`."""
        return None

    def running(self) -> list[int]:
        """As in `Attempt`."""
        ranks = self.ranks()
        self._seen |= {child for child, parent in parents().items() if parent in ranks}
        return ranks + [pid for pid in self._seen if is_alive(pid)]

    def wait(self, seconds: float) -> list[int]:
        """As in `Attempt`; as a launcher does, ends the peers of a rank that failed.

        First they have time to notice by themselves.
        """
        until = time.monotonic() + seconds
        failed_at = None
        while self.ranks() and time.monotonic() < until:
            self.running()  # to know their children
            time.sleep(0.1)
            if failed_at is None and any(process.exitcode for process in self._processes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + PEER_SECONDS:
                break
        for pid in self.ranks():
            self.told += 1
            send(pid, signal.SIGUSR1)  # its threads' stacks go to the log
            time.sleep(0.5)
            send(pid, signal.SIGTERM)
        return super().wait(LAUNCHER_SECONDS)

    def exit_code(self) -> int | None:
        """As in `Attempt`."""
        codes = [process.exitcode for process in self._processes]
        if None in codes:
            return None
        return next((code for code in codes if code), 0)


class LaunchedAttempt(Attempt):
    """`accelerate launch`, as a user types it: a start takes many seconds of imports."""

    _count = 0

    def __init__(self, folder: Path, variant: str, *, world_size: int) -> None:
        config = CONFIGS / ("fsdp2_cpu.yaml" if world_size > 1 else "single.yaml")
        LaunchedAttempt._count += 1
        self._mark = f"{_MARK}={os.getpid()}-{LaunchedAttempt._count}"
        name, value = self._mark.split("=")
        with log_of(folder).open("a") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "accelerate.commands.launch"),
                    *("--config_file", str(config), str(SCRIPT), str(folder), variant),
                ],
                env=os.environ | {name: value, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def wait(self, seconds: float) -> list[int]:
        """As in `Attempt`."""
        left = super().wait(seconds)
        self._process.wait(timeout=10)  # it may be past the point where it shows its variables
        return left

    def ranks(self) -> list[int]:
        """As in `Attempt`."""
        mine = parents()
        return [pid for pid in self.running() if mine.get(pid) == self._process.pid]

    def launcher(self) -> int | None:
        """As in `Attempt`."""
        return self._process.pid

    def running(self) -> list[int]:
        """As in `Attempt`."""
        self._process.poll()
        return [pid for pid in parents() if self._mark in environment_of(pid) and is_alive(pid)]

    def exit_code(self) -> int | None:
        """As in `Attempt`."""
        return self._process.poll()


def logged_run(folder: str, variant: str) -> None:
    """The toy run with its output in a file beside its folder."""
    import transformers  # noqa: F401 (its handlers take the streams that are there)

    with log_of(Path(folder)).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # As in a process that a launcher starts. A forkserver and its DataLoader workers would keep
    # each other alive.
    multiprocessing.set_start_method("fork", force=True)
    try:
        toy_run.run(folder, variant)
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def log_of(folder: Path) -> Path:
    """Where a run's output goes."""
    return folder.with_suffix(".log")


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; whether the process was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def parents() -> dict[int, int]:
    """Parent of every process, from /proc."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            found[int(entry.name)] = int(fields[1])
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and not been waited for does not)."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def environment_of(pid: int) -> list[str]:
    """The variables a process was started with."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _stat(pid: int) -> list[str]:
    """State, parent and what follows."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
