"""A rank that stalls ends the run, with the last step and the stack of every rank.

Without this, the other ranks wait for it in a collective until that times out (NCCL: 30 minutes),
and a single process waits for ever. The main thread says at every turn of a step where it is: one
assignment, no synchronisation. Two threads of each rank look on:

* one publishes that place through the launcher's key-value store and, once its own rank is silent,
  reads where the others are. The store may hang with the rank that holds it, so
* the other touches nothing outside its process. It measures the main thread's silence, writes its
  stacks down, and ends the process, which a main thread inside a collective cannot do itself.

The silence is counted while training steps are made only: not before the first step of a session
has ended (compiling, capturing graphs), nor in what the trainer announces by `away` (evaluation,
checkpoints, the end). Time in which this process itself was stopped (SIGSTOP, a suspended laptop)
does not count either, because it is counted in turns of the watching thread.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from lora_fsdp.errors import StalledRankError
from lora_fsdp.printing import say

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
_MOST_POLL_SECONDS = 5.0
_runs = itertools.count()


class Heartbeat:
    """Watches that training steps are made.

    Args:
        rank, world_size: this process and the number of processes.
        stall_seconds: longest silence of the main thread; 0 = watch nothing.
        run_folder: where `stalled/` goes, with every rank's stacks.
    """

    def __init__(
        self, *, rank: int, world_size: int, stall_seconds: float, run_folder: Path
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.stall_seconds = stall_seconds
        self.folder = run_folder / "stalled"
        self.poll_seconds = min(_MOST_POLL_SECONDS, stall_seconds / 10)
        self._place = (0, "before the first step")
        self._away: list[str] = ["the first step"]
        self._grace_seconds = 3 * self.poll_seconds + 1
        self._ending = False
        self._beats = 0
        self._silence = 0.0
        self._others: dict[int, str] = {}
        self._turns: dict[int, tuple[int, float]] = {}
        self._over = threading.Event()
        # Ranks enter training together, so that they count alike.
        prefix = f"lora_fsdp/heartbeat/{next(_runs)}"
        self._store = PrefixStore(prefix, _get_default_store()) if world_size > 1 else None

    def beat(self, step: int, doing: str) -> None:
        """Say that the main thread is at `doing` in `step` (from 1)."""
        self._place = (step, doing)
        self._beats += 1

    def armed(self) -> None:
        """From now on silence counts: a step has been made."""
        if "the first step" in self._away:
            self._away.remove("the first step")

    @contextmanager
    def away(self, doing: str) -> Iterator[None]:
        """Leave out what may rightly take long."""
        self._away.append(doing)
        self._beats += 1
        try:
            yield
        finally:
            self._away.remove(doing)
            self._beats += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the block ends."""
        threads = [
            threading.Thread(target=target, name=f"lora_fsdp-{name}", daemon=True)
            for name, target in (("heartbeat", self._watch), ("heartbeat-store", self._publish))
            if self.stall_seconds > 0
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        except BaseException:
            if self._ending:  # a collective failed because another rank has just ended so
                threads[0].join(timeout=2 * self._grace_seconds)  # it ends this process
            raise
        finally:
            self._over.set()
            for thread in threads:  # that of a store which does not answer is left behind
                thread.join(timeout=self.poll_seconds + 1)

    def _where(self) -> str:
        step, doing = self._place
        return f"step {step}, {self._away[-1] if self._away else doing}"

    # ---- the thread that looks at this process only ----------------------------------------------

    def _watch(self) -> None:
        last = self._beats
        while not self._over.wait(self.poll_seconds):
            if self._beats != last or self._away:
                last, self._silence = self._beats, 0.0
                continue
            self._silence += self.poll_seconds
            if self._silence >= self.stall_seconds:
                self._end(last)

    def _end(self, last: int) -> None:
        """Write the stacks, give the other ranks time for theirs, and end the process."""
        self._ending = True
        stacks = self._write_stacks()
        # The rank that stalled was silent first; the others notice within a turn of their threads.
        if self._over.wait(self._grace_seconds) or self._beats != last:
            self._ending, self._silence = False, 0.0  # it has moved after all
            return
        error = StalledRankError(
            f"No progress in {self._silence:.0f} s (--stall_seconds {self.stall_seconds:g}). Last "
            f"seen: {self._last_seen()}. Every rank's stacks: {stacks.parent}. Earlier checkpoints "
            "are as they were: continue with --resume_from_checkpoint true."
        )
        say(f"StalledRankError: {error}", file=sys.__stderr__, flush=True)
        get_error_handler().record_exception(error)
        os._exit(EXIT_CODE)

    def _write_stacks(self) -> Path:
        """Every thread's stack, to a file of this rank and to stderr."""
        file = self.folder / f"rank-{self.rank}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file.open("w", encoding="utf-8") as opened:
                opened.write(f"rank {self.rank}, process {os.getpid()}: {self._where()}\n")
                opened.flush()
                faulthandler.dump_traceback(opened, all_threads=True)
        except OSError as error:
            say(f"{file} cannot be written: {error}", file=sys.__stderr__)
        say(f"Stacks of rank {self.rank}, {self._where()}:", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        return file

    def _last_seen(self) -> str:
        seen = {rank: self._others.get(rank, "no answer") for rank in range(self.world_size)}
        seen[self.rank] = self._where()
        return "; ".join(f"rank {rank}: {place}" for rank, place in seen.items())

    # ---- the thread that talks to the other ranks ------------------------------------------------

    def _publish(self) -> None:
        store = self._store
        if store is None:
            return
        try:
            for turn in itertools.count():
                mine = json.dumps({"where": self._where(), "turn": turn})
                store.set(str(self.rank), mine)
                if self._silence > self.stall_seconds / 2:
                    self._read_others(store)
                if self._over.wait(self.poll_seconds):
                    return
        except RuntimeError:
            return  # the store is gone: its launcher, or the rank that held it, has ended

    def _read_others(self, store: PrefixStore) -> None:
        """Where the others are, and whether their own threads still turn."""
        for rank in range(self.world_size):
            if rank == self.rank or not store.check([str(rank)]):
                continue
            seen = json.loads(store.get(str(rank)))
            now = time.monotonic()
            earlier, since = self._turns.get(rank, (-1, now))
            if seen["turn"] != earlier:
                since = now
            self._turns[rank] = (seen["turn"], since)
            quiet = now - since
            frozen = quiet > 3 * self.poll_seconds
            note = f" (its process has not answered for {quiet:.0f} s)" if frozen else ""
            self._others[rank] = seen["where"] + note
