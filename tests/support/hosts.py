"""Hosts on one machine: network namespaces with their own addresses, names and cable.

    host 0 ── eth0 ──┐
                     ├── a bridge, in a namespace of its own
    host 1 ── eth0 ──┘

A host has a loopback of its own, so that nothing reaches another one but over its `eth0`, whose
counters say how many bytes crossed the network. Files are shared, as by a network disk;
`Host.start` can put another folder in the place of one, for this host only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Host:
    """One of them.

    Attributes:
        namespace: of the kernel.
        name: that all of them know it by, and that it has itself.
        address: IPv4, of its `eth0`.
        processes: that were started on it.
    """

    namespace: str
    name: str
    address: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self,
        words: Sequence[str],
        *,
        variables: Mapping[str, str] | None = None,
        instead: Mapping[Path, Path] | None = None,
        log: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command on this host.

        Args:
            words: of the command.
            variables: added to its environment.
            instead: files and folders to be seen in the place of others, by the other's path.
            log: file for its output; `None` = a pipe.
        """
        mounts = [f'mount --bind "{mine}" "{theirs}"' for theirs, mine in (instead or {}).items()]
        shell = " && ".join([f"hostname {self.name}", *mounts, 'exec "$@"'])
        output = subprocess.PIPE if log is None else log.open("w", encoding="utf-8")
        entering = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", shell]
        process = subprocess.Popen(
            [*entering, "sh", *words],
            env={**clean_environment(), **(variables or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if log is not None:
            output.close()  # type: ignore[union-attr]
        self.processes.append(process)
        return process

    def sent(self) -> int:
        """Bytes that have left it, with all headers."""
        return self._counters()["tx"]["bytes"]

    def received(self) -> int:
        """Bytes that have reached it."""
        return self._counters()["rx"]["bytes"]

    def limit(self, *, megabits: int) -> None:
        """Let so many bits a second leave it from now on."""
        rate = f"{megabits}mbit"
        words = ["qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate]
        _run("tc", "-n", self.namespace, *words, "burst", "256kb", "latency", "400ms")

    def cut(self) -> None:
        """Pull its cable."""
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Plug its cable in again; what it sends arrives."""
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        for state in ("permanent", "all"):
            _run("ip", "-n", self.namespace, "neigh", "flush", "dev", "eth0", "nud", state)

    def mute(self, others: Sequence[Host]) -> None:
        """Lose every packet that it sends to others; it still gets theirs, and nobody is told.

        Its packets go to a card that is not there.
        """
        for other in others:
            if other is not self:
                there = [other.address, "lladdr", "02:00:00:00:00:01", "nud", "permanent"]
                _run("ip", "-n", self.namespace, "neigh", "replace", *there, "dev", "eth0")

    def kill(self) -> None:
        """End all that runs on it, at once, as where its power fails."""
        for number in self.pids():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def pids(self) -> list[int]:
        """Of all processes that run on it."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        return [int(number) for number in found.stdout.split()]

    def _counters(self) -> dict[str, dict[str, int]]:
        shown = _run("ip", "-n", self.namespace, "-s", "-j", "link", "show", "eth0")
        return dict(json.loads(shown)[0]["stats64"])


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts; when the block ends, nothing is left of them or of what ran on them."""
    if (reason := why_no_hosts()) is not None:
        pytest.skip(f"no hosts can be made of network namespaces here: {reason}")
    run = uuid.uuid4().hex[:6]
    switch = f"lf{run}-switch"
    made: list[Host] = []
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for place in range(count):
            host = Host(f"lf{run}-{place}", f"host{place}", f"10.77.0.{place + 1}")
            made.append(host)
            _connect(host, switch, port=f"lf{run}p{place}")
        names = "".join(f"{host.address} {host.name}\n" for host in made)
        for host in made:
            folder = Path("/etc/netns", host.namespace)  # `ip netns exec` puts it over /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        yield made
    finally:
        for host in made:
            host.kill()
            for process in host.processes:
                process.wait(timeout=30)
                if process.stdout is not None:
                    process.stdout.close()
            shutil.rmtree(Path("/etc/netns", host.namespace), ignore_errors=True)
        for namespace in (*(host.namespace for host in made), switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


@cache
def why_no_hosts() -> str | None:
    """Why no namespaces can be made here; `None` = they can."""
    if not sys.platform.startswith("linux"):
        return "this is not Linux"
    if os.geteuid() != 0:
        return "only root may make them"
    if missing := [name for name in ("ip", "tc", "unshare", "mount") if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed"
    probe = f"lf{uuid.uuid4().hex[:6]}"
    words = (
        ["netns", "add", probe],
        ["-n", probe, "link", "add", "bridge", "type", "bridge"],
        ["-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "other"],
    )
    try:
        for one in words:
            done = subprocess.run(["ip", *one], capture_output=True, text=True, check=False)
            if done.returncode:
                return f"ip {' '.join(one)}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None


def clean_environment() -> dict[str, str]:
    """Of a new shell, with this checkout to be imported and no launcher's variables."""
    others = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "GLOO_", "MASTER_", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHDYNAMO_DISABLE": "1",
    }


def finish(processes: Sequence[subprocess.Popen[str]], *, seconds: float) -> list[str]:
    """What they printed, when all have ended.

    Raises:
        TimeoutError: one has not.
    """
    until = time.monotonic() + seconds
    printed = []
    for place, process in enumerate(processes):
        try:
            out, _ = process.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            text = error.output.decode() if isinstance(error.output, bytes) else error.output
            raise TimeoutError(f"process {place} hangs; it printed:\n{text}") from error
        printed.append(out or "")
    return printed


def _connect(host: Host, switch: str, *, port: str) -> None:
    _run("ip", "netns", "add", host.namespace)
    _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
    peer = ["peer", "name", "eth0", "netns", host.namespace]
    _run("ip", "-n", switch, "link", "add", port, "type", "veth", *peer)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
