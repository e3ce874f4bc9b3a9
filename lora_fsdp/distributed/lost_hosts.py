"""A host that is gone ends the run's other processes within a minute, whatever they are doing.

A process that waits for another one in a collective, a rendezvous or a barrier learns from it only
that no answer comes; over NCCL it waits until the process group's timeout, 30 minutes. So each
process of a run on several hosts holds one connection to the run's first process, from before the
process group exists until its end. The kernels on both sides keep it alive (tcp(7)): a process that
ended is known at once, a host without power or cable, or whose packets are lost in one direction,
after `LOST_SECONDS`. A process that is only busy answers, whatever it computes: no
thread of it has to run for that. The first process tells the others, and each ends itself, which a
main thread inside a collective cannot do.

The connections' port is chosen by the first process's kernel, and told through the launcher's
key-value store. Not watched: runs on one host, and hosts that are not Linux.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from lora_fsdp.errors import LostHostError
from lora_fsdp.printing import say
from lora_fsdp.ranks import is_joined

EXIT_CODE = 70  # as for a rank that stalls
#: Until a host whose kernel does not answer is lost.
LOST_SECONDS = 30
#: How long after the first process came a host's first one may come: imports from a cold network
#: disk take minutes, and machines that are started by hand are not started together.
START_SECONDS = 300
#: For a main thread that has failed for the same reason, and says more about it.
_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.5
_LONGEST = 4096
_KEY = "lora_fsdp/lost_hosts"
_BYE = {"bye": True}
_RESUME = "Earlier checkpoints are as they were: continue with --resume_from_checkpoint true."


@dataclass(frozen=True)
class _Place:
    """This process among the others, as its launcher says."""

    rank: int
    host: int
    hosts: int
    address: str
    port: int

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> _Place | None:
        """`None` where there is one host, or no launcher."""
        needed = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if any(name not in variables for name in needed):
            return None
        rank, ranks, each = (int(variables[name]) for name in needed[:3])
        hosts = int(variables.get("GROUP_WORLD_SIZE", -(-ranks // each)))
        if hosts < 2:
            return None
        host = int(variables.get("GROUP_RANK", rank // each))
        return cls(rank, host, hosts, variables["MASTER_ADDR"], int(variables["MASTER_PORT"]))


_watches: list[_Watch] = []


def watch_hosts() -> None:
    """Watch the run's other hosts until this process ends; nothing where there are none.

    A second call changes nothing.
    """
    if _watches or sys.platform != "linux":
        return
    if (place := _Place.of(os.environ)) is not None:
        kind = _First if place.rank == 0 else _Other
        _watches.append(kind(place, starting=not is_joined()))
        _watches[0].start()
        atexit.register(_leave)


@contextmanager
def watching_hosts() -> Iterator[None]:
    """Watch them until the block ends; one that fails here is gone to the others.

    The run's first process leaves first: until it has written what is to be kept, the others are
    there to begin anew with, should it be lost.
    """
    watch_hosts()
    try:
        yield
    except BaseException:
        _leave(failed=True)
        raise
    for watch in _watches:
        watch.see_first_off()
    _leave()


def _leave(*, failed: bool = False) -> None:
    """This process ends as it should; where it failed, the others are to know that it is gone."""
    failed = failed or "last_value" in vars(sys)  # what ended the main thread
    while _watches:
        _watches.pop().stop(say_bye=not failed)


class _Watch:
    """One process's side.

    Args:
        place: this process.
        starting: the others are about to start too, so that one that does not come is lost. Once
            they are joined, one may come here long before another.
    """

    def __init__(self, place: _Place, *, starting: bool) -> None:
        self.place, self.starting = place, starting
        self.over = threading.Event()
        self.until = time.monotonic() + START_SECONDS
        self.thread = threading.Thread(target=self._run, name="lora_fsdp-hosts", daemon=True)

    def start(self) -> None:
        """Watch, in a thread."""
        self.thread.start()

    def see_first_off(self) -> None:
        """Wait until the first process has finished; this one has."""

    def stop(self, *, say_bye: bool) -> None:
        """Watch no longer; what did not say bye is seen to end with its process."""
        self.over.set()
        if say_bye:
            self._tell(_BYE)

    def _run(self) -> None:
        raise NotImplementedError

    def _tell(self, message: Mapping[str, object]) -> None:
        raise NotImplementedError

    def _store(self) -> TCPStore | None:
        """A connection of its own: the process group's waits with its main thread."""
        place = self.place
        while not self.over.is_set():
            left = max(1.0, self.until - time.monotonic())
            try:
                socket.create_connection(
                    (place.address, place.port), timeout=min(5.0, left)
                ).close()
                return TCPStore(
                    place.address,
                    place.port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=left),
                )
            except (OSError, RuntimeError):
                if time.monotonic() > self.until:
                    return None
            self.over.wait(_POLL_SECONDS)
        return None

    def _end(self, sentence: str, *, grace: float) -> None:
        """End this process, unless its main thread ends it in time."""
        if self.over.wait(grace):
            return
        error = LostHostError(f"{sentence} {_RESUME}")
        say(f"LostHostError: {error}", file=sys.__stderr__, flush=True)
        get_error_handler().record_exception(error)
        os._exit(EXIT_CODE)


class _First(_Watch):
    """The first process: holds a connection to every other one."""

    def __init__(self, place: _Place, *, starting: bool) -> None:
        super().__init__(place, starting=starting)
        self.token = secrets.token_hex(16)
        self.names: dict[socket.socket, str] = {}
        self.come = {place.host}

    def _run(self) -> None:
        store = self._store()
        if store is None:
            return  # without a store no process group comes about, which says so itself
        with (
            _listening() as server,
            selectors.DefaultSelector() as at,
        ):
            server.setblocking(False)
            store.set(_KEY, json.dumps([server.getsockname()[1], self.token]))
            at.register(server, selectors.EVENT_READ)
            while not self.over.is_set():
                for key, _ in at.select(timeout=_POLL_SECONDS):
                    if key.fileobj is server:
                        self._welcome(server, at)
                    elif isinstance(key.fileobj, socket.socket):
                        self._hear(key.fileobj, at)
                self._miss()

    def _welcome(self, server: socket.socket, at: selectors.BaseSelector) -> None:
        link, _ = server.accept()
        link.settimeout(5.0)
        try:
            token, host, name = (_next_message(link) or {})["hello"]
        except (OSError, ValueError, KeyError, TypeError):
            token = None
        if token != self.token:  # a stranger: a scan of ports, an earlier attempt
            link.close()
            return
        keep_alive(link)
        self.names[link] = str(name)
        self.come.add(int(host))
        at.register(link, selectors.EVENT_READ)

    def _hear(self, link: socket.socket, at: selectors.BaseSelector) -> None:
        reason: object
        try:
            reason = _next_message(link)
        except OSError as error:
            reason = error
        if reason == _BYE:  # it may be waiting for this one's
            at.unregister(link)
            return
        self._lose(_lost(self.names[link], reason), ended=reason is None)

    def _miss(self) -> None:
        """Whether a host has not come in time."""
        if not self.starting or time.monotonic() < self.until:
            return
        self.starting = False
        if missing := sorted(set(range(self.place.hosts)) - self.come):
            numbers = ", ".join(str(one) for one in missing)
            self._lose(
                f"Of {self.place.hosts} machines number {numbers} (from 0) did not start its "
                f"processes in {START_SECONDS} s: look at what they say.",
                ended=False,
            )

    def _lose(self, sentence: str, *, ended: bool) -> None:
        """End all processes; where only one has ended, the others may be about to."""
        grace = _GRACE_SECONDS if ended else 0.0
        self._tell({"lost": sentence, "grace": grace})
        self._end(sentence, grace=grace + 1)

    def _tell(self, message: Mapping[str, object]) -> None:
        for link in list(self.names):
            _send(link, message)


class _Other(_Watch):
    """Any other process: holds a connection to the first one."""

    link: socket.socket | None = None

    def see_first_off(self) -> None:
        """Wait until the first process has finished; one that is lost ends this one."""
        if self.link is not None:
            self._tell(_BYE)
            self.thread.join()

    def _run(self) -> None:
        self.link = self._connected()
        address = self.place.address
        if self.link is None:
            if self.starting and not self.over.is_set():
                sentence = f"The first machine, {address}, did not answer in {START_SECONDS} s."
                self._end(sentence, grace=0.0)
            return
        reason: object
        try:
            reason = _next_message(self.link)
        except OSError as error:
            reason = error
        if self.over.is_set() or reason == _BYE:
            return
        if isinstance(reason, dict):
            self._end(str(reason["lost"]), grace=float(reason["grace"]))
        self._end(_lost(address, reason), grace=_GRACE_SECONDS if reason is None else 0.0)

    def _connected(self) -> socket.socket | None:
        store = self._store()
        while store is not None and not self.over.is_set():
            try:
                if store.check([_KEY]):
                    port, token = json.loads(store.get(_KEY))
                    link = socket.create_connection((self.place.address, port), timeout=5.0)
                    keep_alive(link)
                    _send(link, {"hello": [token, self.place.host, socket.gethostname()]})
                    return link
            except (OSError, RuntimeError):  # an earlier attempt's, or it is gone
                pass
            if self.starting and time.monotonic() > self.until:
                return None
            self.over.wait(_POLL_SECONDS)
        return None

    def _tell(self, message: Mapping[str, object]) -> None:
        if self.link is not None:
            _send(self.link, message)


def _lost(name: str, reason: object) -> str:
    if isinstance(reason, OSError):
        return (
            f"{name} has not answered for {LOST_SECONDS} s ({reason.strerror}): it has no power, "
            "or the network between it and the others is interrupted."
        )
    return f"A process on {name} has ended before the run did: look at what it said there."


def _listening() -> socket.socket:
    """At any free port of all addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=1024)


def keep_alive(link: socket.socket) -> None:
    """Have the kernel ask the other side's whether it is there; no answer is an `OSError`."""
    link.setblocking(True)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, LOST_SECONDS // 3),
        (socket.TCP_KEEPINTVL, max(1, LOST_SECONDS // 6)),
        (socket.TCP_KEEPCNT, 4),
        (socket.TCP_USER_TIMEOUT, LOST_SECONDS * 1000),
    ):
        link.setsockopt(socket.IPPROTO_TCP, option, value)


def _send(link: socket.socket, message: Mapping[str, object]) -> None:
    try:
        link.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # it is gone, which is told elsewhere


def _next_message(link: socket.socket) -> dict[str, Any] | None:
    """A line that the other side sent; `None` = it has closed the connection.

    Raises:
        OSError: it does not answer.
    """
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST:
        try:
            part = link.recv(1)
        except ConnectionResetError:
            return None
        if not part:
            return None
        line += part
    return dict(json.loads(line))
