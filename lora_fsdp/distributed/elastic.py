"""The rendezvous of machines that come and go, for torchrun's agents.

An agent of torchrun on each machine starts that machine's processes. The agents meet in rounds; who
is there stands in a store on the first machine, where each renews its heartbeat. The agents, their
store and their rounds are torch's own, and three things are added, without which machines that are
left wait for one that is gone:

1. torch's agents start their processes again when these fail or when a machine comes, and not when
   a heartbeat has stopped (https://github.com/pytorch/pytorch/issues/111646). Processes that still
   start wait for those of a lost machine and do not fail: nobody has a connection yet on which its
   end could be seen. Here a machine of the round that is gone is a change like one that comes.
2. A machine that is lost after a round is settled, and before all have told one another where their
   processes meet, ends torch's agents on all the others by a time-out. Here they meet again.
3. `TCPStore` waits without a limit for a machine that answers nothing, not even that a wait is
   over: the kernel gives up after a quarter of an hour. Here it does after `LOST_SECONDS`.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta

import psutil
from torch.distributed import DistStoreError, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from lora_fsdp.distributed.lost_hosts import keep_alive
from lora_fsdp.errors import RankMismatchError

#: Our name among torchrun's rendezvous backends.
BACKEND = "c10d-elastic"
_PORT = 29400  # torchrun's, where the endpoint names none
_POLL_SECONDS = 0.1
#: Of `--rdzv_conf`: how many processes this machine's agent starts.
PROCESSES = "processes"


class ElasticRendezvous(DynamicRendezvousHandler):
    """torch's rendezvous, which also notices who has gone.

    Its state has no public name: `_state_holder` is where torch 2.6 to 2.13 keep it.
    """

    #: That this machine's agent starts.
    processes: int = 0
    _round: frozenset[object] = frozenset()

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round in which all stay until each knows that the others are there.

        Raises:
            RankMismatchError: another machine starts another number of processes.
        """
        while True:
            self._round = frozenset()
            try:
                found = super().next_rendezvous()
            except DistStoreError:
                continue  # the one that says where to meet is gone
            self._round = frozenset(self._state_holder.state.participants)
            if self._all_there(found.store, found.rank, found.world_size):
                return found

    def num_nodes_waiting(self) -> int:
        """Machines that have come or gone since the round began: the agents then meet anew."""
        waiting = super().num_nodes_waiting()
        state = self._state_holder.state
        if state.closed:  # those that have finished leave
            return waiting
        return waiting + len(self._round.difference(state.participants))

    def _all_there(self, store: Store, rank: int, count: int) -> bool:
        """Whether each has told how many processes it starts, before one has gone."""
        keys = [f"processes/{one}" for one in range(count)]
        store.set(keys[rank], str(self.processes))
        while not store.check(keys):
            if self.num_nodes_waiting() or self.is_closed():
                return False
            time.sleep(_POLL_SECONDS)
        told = {int(store.get(key)) for key in keys}
        if len(told) > 1:
            raise RankMismatchError(
                f"The machines start different numbers of processes, {sorted(told)}: give each the "
                "same --nproc_per_node."
            )
        return True


def _create(params: RendezvousParameters) -> RendezvousHandler:
    backend, _ = create_backend(params)
    interval = params.get_as_int("keep_alive_interval", 5) or 5
    attempts = params.get_as_int("keep_alive_max_attempt", 3) or 3
    # Another connection: where agents wait for one another, that of the heartbeats must not wait.
    host, port = parse_rendezvous_endpoint(params.endpoint, default_port=_PORT)
    until_gone = timedelta(seconds=interval * attempts)
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=until_gone)
    _keep_alive_to(port)
    handler = ElasticRendezvous.from_backend(
        params.run_id,
        store,
        backend,
        params.min_nodes,
        params.max_nodes,
        params.local_addr,
        RendezvousTimeout(
            **{
                name: timedelta(seconds=seconds)
                for name in ("join", "last_call", "close", "heartbeat")
                if (seconds := params.get_as_int(f"{name}_timeout")) is not None
            }
        ),
        keep_alive_interval=interval,
        keep_alive_max_attempt=attempts,
    )
    handler._backend_name = BACKEND
    handler.processes = params.get_as_int(PROCESSES, 1) or 1
    return handler


def _keep_alive_to(port: int) -> None:
    """Have the kernel notice that the other side of this process's connections there is gone."""
    if sys.platform != "linux":
        return
    for one in psutil.Process().net_connections("tcp"):
        if one.raddr and one.raddr.port == port:
            with socket.socket(fileno=os.dup(one.fd)) as link:
                keep_alive(link)


def register() -> None:
    """Make our backend known to torchrun in this process; a second call changes nothing."""
    rendezvous_handler_registry.register(BACKEND, _create)
    # Otherwise a machine that comes back waits for an address that nobody tells it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Ranks follow from the round alone, since all start as many: nothing more is to be told.
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
