"""Processes that share a job without a process group: each does its part, and they wait at points.

For work whose parts need nothing of one another. They wait through the store of the launcher that
started them (torchrun, `accelerate launch`); a process that fails takes its launcher along.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lora_fsdp.errors import LaunchError

_POLL_SECONDS = 0.1
_CONNECT_SECONDS = 60


@dataclass(frozen=True)
class Workers:
    """This process among those that share a job.

    Attributes:
        rank, size: its place, and how many there are.
        store: through which they wait; `None` = it is alone.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None

    @classmethod
    def of_launcher(cls, variables: Mapping[str, str] | None = None) -> Workers:
        """Those of the launcher that started this process, by its environment; one without.

        Raises:
            LaunchError: the launcher's store cannot be reached.
        """
        given = os.environ if variables is None else variables
        size = int(given.get("WORLD_SIZE", "1"))
        if size == 1 or "TORCHELASTIC_RUN_ID" not in given:
            return cls()
        try:
            found = next(rendezvous("env://", timeout=timedelta(seconds=_CONNECT_SECONDS)))
        except (DistError, RuntimeError, ValueError) as error:
            raise LaunchError(f"The launcher's store cannot be reached: {error}") from error
        store, rank, size = found
        attempt = given.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(rank, size, PrefixStore(f"lora_fsdp/workers/{attempt}", store))

    @property
    def is_first(self) -> bool:
        """Whether this one begins and ends the job."""
        return self.rank == 0

    def does(self, part: int) -> bool:
        """Whether a part, counted from 0, is this one's."""
        return part % self.size == self.rank

    def wait(self, point: str) -> None:
        """Wait until all of them are at `point`.

        Raises:
            LaunchError: the launcher has ended.
        """
        self.reach(point)
        self._until(point, self.size)

    def reach(self, point: str) -> None:
        """Say that this one is at `point`."""
        if self.store is not None:
            self.store.add(point, 1)

    def wait_for_first(self, point: str) -> None:
        """Wait until the first one has reached `point`, which no other one reaches."""
        if self.is_first:
            self.reach(point)
        self._until(point, 1)

    def _until(self, point: str, count: int) -> None:
        try:
            while self.store is not None and self.store.add(point, 0) < count:
                time.sleep(_POLL_SECONDS)
        except (DistError, RuntimeError) as error:
            raise LaunchError(f"The launcher has ended before all were at {point!r}.") from error
