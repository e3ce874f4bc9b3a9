"""Where a run's time goes: seconds of its first process by what it did, which add up to the whole.

One thing is done at a time; what is done within another counts where it belongs and not twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import psutil

#: In the order in which a run does them. `other`: what nobody has named.
PARTS = ("start", "read", "score", "capture", "train", "evaluate", "save", "report", "other")
#: When the command was started, in seconds since 1970; set by `lora-fsdp train` for its processes.
STARTED = "LORA_FSDP_STARTED"
# Of another command: nothing takes so long to start.
_OLDEST_START = 600.0

_began: float | None = None


class TimeSpent:
    """A clock that always counts for one part.

    Args:
        before: seconds that had passed when it was made, which count as `start`.
    """

    def __init__(self, *, before: float = 0.0) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._seconds["start"] = before
        self._part, self._since = "other", time.perf_counter()

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Within the block, time counts for `part`, one of `PARTS`."""
        outer = self._turn_to(part)
        try:
            yield
        finally:
            self._turn_to(outer)

    def seconds(self) -> dict[str, float]:
        """So far, by part, to the millisecond; those that took no time too."""
        self._turn_to(self._part)
        return {part: round(seconds, 3) for part, seconds in self._seconds.items()}

    def _turn_to(self, part: str) -> str:
        now, outer = time.perf_counter(), self._part
        self._seconds[outer] += now - self._since
        self._part, self._since = part, now
        return outer


_current: ContextVar[TimeSpent | None] = ContextVar("time_spent", default=None)


def process_began() -> None:
    """Let the next run's time begin where this process, or the command that started it, did.

    For the processes of a launch. Elsewhere, as in a notebook, a run begins when it is called.
    """
    global _began
    _began = psutil.Process().create_time()
    try:
        told = float(os.environ.get(STARTED, "nan"))
    except ValueError:
        return
    if 0 <= _began - told < _OLDEST_START:
        _began = told


@contextmanager
def measured() -> Iterator[TimeSpent]:
    """Within the block, `spent_on` counts for a new clock."""
    global _began
    before = 0.0 if _began is None else max(0.0, time.time() - _began)
    _began = None
    spent = TimeSpent(before=before)
    token = _current.set(spent)
    try:
        yield spent
    finally:
        _current.reset(token)


@contextmanager
def spent_on(part: str) -> Iterator[None]:
    """Within the block, time counts for `part` of the run that is measured, if there is one."""
    if (spent := _current.get()) is None:
        yield
        return
    with spent.on(part):
        yield


def seconds_by_part() -> dict[str, float]:
    """Of the run that is measured, so far; empty where none is."""
    spent = _current.get()
    return {} if spent is None else spent.seconds()
