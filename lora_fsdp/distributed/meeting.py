"""Where the launchers of several machines meet, tried before any of them starts a process.

Each machine's launcher writes a record of what it is going to start into a key-value store on the
first machine, at the port that training will use. Machines that do not come, come twice or would
start something else are named here; torch's own rendezvous waits for them for minutes, and trains
with what it gets.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from lora_fsdp.errors import LaunchError

#: accelerate's, where none is named.
USUAL_PORT = 29500
_POLL_SECONDS = 0.2
_TO_READ_SECONDS = 10.0


@dataclass(frozen=True)
class Meeting:
    """What a machine's launcher is told of the others.

    Attributes:
        machines: how many there are.
        place: of this one among them, from 0.
        address: of the first one, a name or IPv4.
        port: that is free there.
        processes: on all machines together.
    """

    machines: int
    place: int
    address: str
    port: int
    processes: int


def meeting_of(
    settings: Mapping[str, object], *, machines: int, processes: int, is_placed: bool
) -> Meeting:
    """The meeting that is asked for.

    Args:
        settings: `machine_rank`, `main_process_ip` and `main_process_port`, by accelerate's names.
        machines, processes: how many.
        is_placed: whether anything says which machine this is.

    Raises:
        LaunchError: one of them is missing, or cannot be.
    """
    if not is_placed:
        raise LaunchError(
            f"{machines} machines, and nothing says which of them this is: give --machine_rank 0 "
            "on the first, 1 on the second, and so on."
        )
    place = _number(settings, "machine_rank")
    if not 0 <= place < machines:
        raise LaunchError(
            f"--machine_rank {place}: with {machines} machines (num_machines) give 0 to "
            f"{machines - 1}, each once."
        )
    if processes % machines:
        raise LaunchError(
            f"{processes} processes (num_processes, of all machines together) cannot be divided "
            f"between {machines} machines (num_machines): accelerate would start "
            f"{processes // machines * machines}; give a multiple of {machines}."
        )
    address = str(settings.get("main_process_ip") or "").strip()
    if not address:
        raise LaunchError(
            f"{machines} machines, and nothing says where they meet: give --main_process_ip, the "
            "address of the first one, on every machine."
        )
    port = USUAL_PORT
    if settings.get("main_process_port") is not None:
        port = _number(settings, "main_process_port")
    if port == 0:
        raise LaunchError(
            f"main_process_port: 0 with {machines} machines (num_machines): each would choose a "
            f"port of its own; name one that is free on the first, such as {USUAL_PORT}."
        )
    if not 0 < port < 65536:
        raise LaunchError(f"main_process_port: {port} is no port: give 1 to 65535.")
    return Meeting(machines, place, address, port, processes)


def check_meeting(meeting: Meeting, *, settings: str, seconds: float) -> None:
    """Meet the other machines' launchers once.

    Args:
        meeting: where.
        settings: what else must be the same for all of them (the YAML's settings), as text.
        seconds: how long to wait for them.

    Raises:
        LaunchError: names the machine, what is wrong there, and what to do.
    """
    _check_resolves(meeting)
    if meeting.place == 0:
        _check_port_is_free(meeting)
    _Talk(meeting, settings=settings, seconds=seconds).run()


def _number(settings: Mapping[str, object], name: str) -> int:
    try:
        return int(str(settings.get(name)))
    except ValueError as error:
        raise LaunchError(f"{name}: {settings.get(name)!r} is no whole number.") from error


def _check_resolves(meeting: Meeting) -> None:
    address = meeting.address
    try:
        found = socket.getaddrinfo(address, meeting.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"main_process_ip: {address!r} does not resolve on {socket.gethostname()} ({error}): "
            "give the first machine's IPv4 address, or name it in /etc/hosts on every machine."
        ) from error
    if not any(family == socket.AF_INET for family, *_ in found):
        raise LaunchError(
            f"main_process_ip: {address!r} has only IPv6 addresses, which accelerate cannot write "
            "before a port: give the first machine's IPv4 address."
        )


def _check_port_is_free(meeting: Meeting) -> None:
    port = meeting.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "is taken" if taken else f"cannot be used ({error.strerror})"
            raise LaunchError(
                f"main_process_port: {port} {reason} on this machine, {socket.gethostname()}, "
                "which is the first: end what uses it (another run, or a second --machine_rank "
                "0), or give every machine another --main_process_port."
            ) from error
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((meeting.address, port)) == 0:
            raise LaunchError(
                f"--machine_rank 0 is given twice: something answers at {meeting.address}:{port} "
                f"already, and it is not this machine, {socket.gethostname()}. Give every machine "
                "another --machine_rank."
            )


@dataclass(frozen=True)
class _Record:
    """What a machine is going to start."""

    name: str
    machines: int
    processes: int
    settings: str


_MEANINGS = {
    "machines": "num_machines",
    "processes": "num_processes",
    "settings": "accelerate YAML",
}


class _Talk:
    """One meeting, seen from this machine."""

    def __init__(self, meeting: Meeting, *, settings: str, seconds: float) -> None:
        self.meeting, self.seconds = meeting, seconds
        self.until = time.monotonic() + seconds
        self.mine = _Record(socket.gethostname(), meeting.machines, meeting.processes, settings)

    def run(self) -> None:
        store = self._store()
        place = self.meeting.place
        written = json.dumps([*asdict(self.mine).values(), time.time_ns()])
        there = store.compare_set(f"here/{place}", "", written).decode()
        if there != written:
            sentence = (
                f"--machine_rank {place} is given twice, on {json.loads(there)[0]} and on "
                f"{self.mine.name}: give every machine another one, from 0 to "
                f"{self.meeting.machines - 1}."
            )
            store.set("twice", sentence)
            raise LaunchError(sentence)
        if place == 0:
            self._judge(store)
        else:
            self._hear(store)

    def _store(self) -> TCPStore:
        meeting = self.meeting
        try:
            if meeting.place > 0:
                self._wait_for_the_first()
            return TCPStore(
                meeting.address,
                meeting.port,
                is_master=meeting.place == 0,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(1.0, self.until - time.monotonic())),
            )
        except (DistError, OSError, RuntimeError, ValueError) as error:
            raise LaunchError(
                f"{socket.gethostname()} (--machine_rank {meeting.place}) could not reach "
                f"{meeting.address}:{meeting.port} in {self.seconds:.0f} s ({error}): start the "
                "first machine too, with --machine_rank 0 and the same --main_process_ip and "
                "--main_process_port, and open that port in its firewall."
            ) from error

    def _wait_for_the_first(self) -> None:
        """Until the first machine listens.

        Raises:
            OSError: it does not.
        """
        address = (self.meeting.address, self.meeting.port)
        while True:
            left = self.until - time.monotonic()
            try:
                socket.create_connection(address, timeout=max(0.1, min(5.0, left))).close()
                return
            except OSError:
                if left <= 0:
                    raise
            time.sleep(_POLL_SECONDS)

    def _judge(self, store: TCPStore) -> None:
        """On the first machine: wait for all, compare, and tell everyone."""
        others = range(1, self.meeting.machines)
        sentence = self._wait_for(store, [f"here/{place}" for place in others])
        if sentence is None:
            records = [self._record(store, place) for place in range(self.meeting.machines)]
            sentence = _difference(records)
        store.set("verdict", sentence or "")
        arrived = [place for place in others if store.check([f"here/{place}"])]
        self.until = time.monotonic() + _TO_READ_SECONDS
        while not store.check([f"read/{place}" for place in arrived] or ["verdict"]):
            if time.monotonic() > self.until:
                break  # it has said itself why it went
            time.sleep(_POLL_SECONDS)
        if sentence:
            raise LaunchError(sentence)

    def _wait_for(self, store: TCPStore, keys: list[str]) -> str | None:
        while True:
            if store.check(["twice"]):
                return store.get("twice").decode()
            missing = [key.removeprefix("here/") for key in keys if not store.check([key])]
            if not missing:
                return None
            if time.monotonic() > self.until:
                return (
                    f"Of {self.meeting.machines} machines (num_machines) --machine_rank "
                    f"{', '.join(missing)} did not come to {self.meeting.address}:"
                    f"{self.meeting.port} in {self.seconds:.0f} s: start it there, and look "
                    "whether it can reach this address and port."
                )
            time.sleep(_POLL_SECONDS)

    def _hear(self, store: TCPStore) -> None:
        """On the others: wait for what the first one says."""
        try:
            while not store.check(["verdict"]):
                time.sleep(_POLL_SECONDS)
            sentence = store.get("verdict").decode()
            store.set(f"read/{self.meeting.place}", "yes")
        except (DistError, RuntimeError) as error:
            raise LaunchError(
                f"The first machine, {self.meeting.address}, has left before training began: look "
                "at what it says."
            ) from error
        if sentence:
            raise LaunchError(sentence)

    def _record(self, store: TCPStore, place: int) -> _Record:
        name, machines, processes, settings, _ = json.loads(store.get(f"here/{place}"))
        return _Record(name, machines, processes, settings)


def _difference(records: list[_Record]) -> str | None:
    """What the first machine that differs from machine 0 has otherwise."""
    first = records[0]
    for place, other in enumerate(records):
        for name, meaning in _MEANINGS.items():
            here, there = getattr(first, name), getattr(other, name)
            if here != there:
                values = f": {there} there and {here} on {first.name} (machine 0)"
                if name == "settings":
                    values = f" than {first.name} (machine 0)"
                return (
                    f"{other.name} (--machine_rank {place}) was started with another "
                    f"{meaning}{values}; give every machine the same YAML and the same options."
                )
    return None
