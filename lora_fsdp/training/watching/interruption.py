"""Stopping on request: SIGTERM to any process of a run, or `--max_hours`.

All ranks must stop after the same optimizer step, or the one that goes on waits for the others for
ever. They agree through the launcher's key-value store and not by a collective, so that a step
costs no synchronisation: a thread on each rank looks into the store twice a second, and a step
costs the main thread one lock.

1. The rank that is asked writes the reason into the store; the thread of every rank sees it.
2. Each thread publishes the step its rank has begun (or may have: a rank that is further along than
   others, because its GPU works through a queue, says so). From then on its rank begins no step
   until the agreement stands.
3. When all have published, the highest begun step is the last: a rank there waits, the others catch
   up. None can be beyond it, and every rank takes part in every collective up to it.

The threads publish whatever their main threads wait for, so that this cannot hang; where a rank or
the store does not answer (the launcher is dead) the ranks end without a new checkpoint.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from lora_fsdp.distributed.orphans import has_launcher
from lora_fsdp.errors import TrainingInterrupted
from lora_fsdp.printing import say

EXIT_CODE = 75
POLL_SECONDS = 0.5
# For ranks that do not answer; torchrun kills them 30 s after its own SIGTERM.
AGREE_SECONDS = 20.0
_runs = itertools.count()


class StopRequests:
    """Watches for requests to stop while training runs.

    Args:
        rank, world_size: this process and the number of processes.
        max_hours: stop by itself after so long.
    """

    def __init__(self, *, rank: int, world_size: int, max_hours: float | None) -> None:
        self.reason = ""
        self._rank, self._world_size = rank, world_size
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._hours = max_hours
        self._parent = os.getppid() if has_launcher() else None
        self._lock = threading.Lock()
        self._begun = 0
        self._noticed = False
        self._interrupted = False
        self._last_step: int | None = None
        self._asked, self._settled, self._over = (threading.Event() for _ in range(3))
        # Ranks enter training together, so that they count alike.
        prefix = f"lora_fsdp/stop/{next(_runs)}"
        self._store = PrefixStore(prefix, _get_default_store()) if world_size > 1 else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn SIGTERM into a request, and look for those of other ranks, until the block ends."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._on_signal) if in_main_thread else None
        # A handler of the user's own, or a notebook's, stays.
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if in_main_thread and is_default:
            signal.signal(signal.SIGINT, self._on_interrupt)
        watcher = threading.Thread(target=self._watch, name="lora_fsdp-stop", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            if in_main_thread:  # first: the handler must not meet this thread in `Event.set`
                signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
                if is_default:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
            self._over.set()
            self._asked.set()
            watcher.join()

    def begin(self, step: int) -> None:
        """Say that `step` is about to begin."""
        self._begun = step

    def is_last(self, step: int) -> bool:
        """Whether the ranks stop after `step`, which has ended; if not, the next one begins.

        Raises:
            TrainingInterrupted: a stop was asked for and the ranks cannot agree on a step.
            KeyboardInterrupt: it was raised before, and Python dropped it.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        with self._lock:
            if not self._noticed:
                self._begun = step + 1
                return False
        self._settled.wait()
        if self._last_step is None:
            raise TrainingInterrupted(
                f"Training stopped ({self.reason}), but not every rank answered: nothing was saved "
                "since the last checkpoint. Continue with --resume_from_checkpoint true."
            )
        return step >= self._last_step

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._ask("SIGTERM")

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        # Raised in a destructor or a callback of C++, it is printed and forgotten: see `is_last`.
        self._interrupted = True
        signal.default_int_handler(number, frame)

    def _ask(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._asked.set()

    def _watch(self) -> None:
        try:
            while not self._over.is_set():
                self._asked.wait(POLL_SECONDS)
                if self._over.is_set():
                    return
                self._look()
                if self.reason:
                    self._agree()
                    return
        except RuntimeError as error:  # torch's errors of a store that is gone
            self._give_up(error)
        finally:
            self._settled.set()

    def _look(self) -> None:
        """Find a reason to stop: time, a dead launcher, another rank's request."""
        if self._rank == 0 and self._deadline is not None and time.monotonic() > self._deadline:
            self._ask(f"--max_hours {self._hours:g}")
        if self._parent is not None and os.getppid() != self._parent:
            self._ask("its launcher has died")
        if not self.reason and self._store is not None and self._store.check(["reason"]):
            self._ask(self._store.get("reason").decode())

    def _agree(self) -> None:
        store = self._store
        if store is not None:
            self.reason = store.compare_set("reason", "", self.reason).decode()
        with self._lock:
            self._noticed = True
            begun = self._begun
        if store is None:
            self._last_step = begun
        else:
            store.set(f"begun/{self._rank}", str(begun))
            keys = [f"begun/{rank}" for rank in range(self._world_size)]
            until = time.monotonic() + AGREE_SECONDS
            while not store.check(keys):
                if time.monotonic() > until:
                    raise RuntimeError("not every rank answered")
                time.sleep(0.05)
            self._last_step = max(int(store.get(key)) for key in keys)
        self._settled.set()

    def _give_up(self, error: RuntimeError) -> None:
        """End this process: by its main thread, or if that waits for a dead rank, from here."""
        self.reason = self.reason or f"the launcher's store is gone: {error}"
        with self._lock:
            self._noticed = True
        self._settled.set()
        if not self._over.wait(AGREE_SECONDS):
            say(f"Stopped ({self.reason}) while waiting for another rank.", file=sys.stderr)
            sys.stderr.flush()
            os._exit(EXIT_CODE)
