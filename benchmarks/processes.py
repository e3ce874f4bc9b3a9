"""An arm's processes: started, waited for, and ended with all that they started."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0


class Started:
    """A command in a process group of its own; what it prints goes to `log`.

    A launcher puts its processes into further sessions, so they are followed by parentage and not
    by group: none outlives `wait`.
    """

    def __init__(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]):
        self.log = log
        with log.open("w") as opened:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=opened,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        self._family: set[psutil.Process] = set()

    def wait(self, seconds: float) -> str | None:
        """Why it failed, or `None`; it is ended after so many seconds."""
        until = time.monotonic() + seconds
        while (code := self.process.poll()) is None and time.monotonic() < until:
            self._look()
            time.sleep(_POLL_SECONDS)
        self.end()
        if code is None:
            return f"not finished within {seconds:.0f} s"
        return None if code == 0 else self._reason(code)

    def end(self) -> None:
        """End it and all that it started, and wait for them to be gone."""
        self._look()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_SECONDS)
        for one in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(list(self._family), timeout=_GRACE_SECONDS)
        self.process.wait()

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            one = psutil.Process(self.process.pid)
            self._family |= {one, *one.children(recursive=True)}

    def _reason(self, code: int) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        # The launcher's own error comes last and says nothing.
        named = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
        named = [re.sub(r"^\[rank\d+\]: ", "", line) for line in named]
        return named[-1][:400] if named else f"ended with {code}: {' '.join(lines[-2:])[:400]}"
