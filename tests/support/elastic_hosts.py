"""Hosts on which torchrun's agents keep a toy run going while hosts die, are cut off and come back.

The agent, its rendezvous and its store are torch's own, as `torchrun --nnodes 1:N` starts them. The
agents and their workers are forked from a server that has imported everything, so that a start
takes a second instead of ten.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lora_fsdp.distributed.elastic import BACKEND, PROCESSES, register
from tests.support.elastic_run import RESULT, Sizes, check_ledger, lines_of, train
from tests.support.hosts import Host
from tests.support.ranks import start_on

PORT = 29500
#: How long what is left may take until it makes steps again: a minute until a lost host is noticed
#: at the latest, and then the start of processes on a machine that may be busy.
NOTICED_SECONDS = 90.0


class HungError(AssertionError):
    """What is left of a run makes no steps, and does not end."""


class ElasticHosts:
    """A run on hosts; one worker on each.

    Args:
        hosts: that take part; the first holds the rendezvous.
        folder: for disks, ledger and logs.
        sizes: of the run.
        apart: every host has a disk of its own.
        seconds: that a step takes at least.
    """

    def __init__(
        self, hosts: list[Host], folder: Path, sizes: Sizes, *, apart: bool, seconds: float
    ) -> None:
        self.hosts, self.folder, self.sizes = hosts, folder, sizes
        self.apart, self.seconds = apart, seconds
        self.ledger = folder / "ledger"
        self.ledger.mkdir(parents=True)
        self.agents: dict[int, BaseProcess] = {}
        self.starts = 0

    # ---- what happens to hosts -----------------------------------------------------------------

    def start(self, place: int) -> None:
        """Start the agent of a host; with others that run, it joins them."""
        self.starts += 1
        log = self.folder / f"host{place}.log"
        self.agents[place] = start_on(
            self.hosts[place], _agent, place, self._given(), self.disk(place), log,
            variables={
                "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            },
        )  # fmt: skip

    def kill(self, place: int) -> None:
        """Its power fails."""
        self.hosts[place].kill()
        if (agent := self.agents.pop(place, None)) is not None:
            agent.join(timeout=30)

    def cut(self, place: int) -> None:
        """Its cable is pulled."""
        self.hosts[place].cut()

    def mute(self, place: int) -> None:
        """Its connections are half open: nothing that it sends arrives."""
        self.hosts[place].mute(self.hosts)

    def replace(self, place: int) -> None:
        """What is left on a host that was lost ends, and its network works again."""
        self.kill(place)
        self.hosts[place].mend()

    # ---- what is to be seen of the run ---------------------------------------------------------

    def disk(self, place: int) -> Path:
        """Where the host's run is."""
        return self.folder / (f"disk-{place}" if self.apart else "disk")

    def running(self) -> list[int]:
        """Hosts whose agent runs."""
        return [place for place, agent in self.agents.items() if agent.exitcode is None]

    def result(self) -> Path | None:
        """Of the finished run."""
        found = [self.disk(place) / "run" / RESULT for place in range(len(self.hosts))]
        return next((file for file in found if file.is_file()), None)

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written now."""
        disks = {self.disk(place) / "run" for place in range(len(self.hosts))}
        return any(any(disk.glob("*.partial")) for disk in disks)

    def lines(self, *, after: int = 0) -> list[dict[str, Any]]:
        """The ledger's, of attempts that began after a time (monotonic nanoseconds)."""
        return [line for line in lines_of(self.ledger) if line["attempt"] > after]

    def wait(self, condition: Callable[[], object], *, seconds: float) -> bool:
        """Until it holds; whether it did before the run was over.

        Raises:
            HungError: it did not, while agents run.
        """
        until = time.monotonic() + seconds
        while not condition():
            if self.result() is not None or not self.running():
                return False
            if time.monotonic() > until:
                raise HungError(f"nothing in {seconds:.0f} s on hosts {self.running()}")
            time.sleep(0.005)
        return True

    def finish(self, *, seconds: float) -> int:
        """Until the run is finished; started anew where everything ended before, as a person does.

        Returns:
            How often it was started anew.

        Raises:
            HungError: it is not finished in time.
        """
        again = 0
        until = time.monotonic() + seconds
        while self.result() is None:
            if not self.running():
                again += 1
                for place in range(len(self.hosts)):
                    self.replace(place)
                    self.start(place)
            if time.monotonic() > until:
                raise HungError(f"not finished in {seconds:.0f} s on hosts {self.running()}")
            time.sleep(0.02)
        for place in list(self.agents):
            self.agents[place].join(timeout=10)
            self.kill(place)
        return again

    def check_ledger(self) -> None:
        """Each row once an epoch, in the steps that count."""
        check_ledger(self.lines(), self.sizes)

    def ask_for_stacks(self) -> None:
        """Have every process write where it is to its host's log."""
        for host in self.hosts:
            for number in host.pids():
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGUSR1)
        time.sleep(1.0)

    def logs(self) -> str:
        """The end of what each host printed."""
        files = sorted(self.folder.glob("host*.log"))
        return "\n".join(f"---- {file.name}\n{file.read_text()[-4000:]}" for file in files)

    def _given(self) -> tuple[Any, ...]:
        addresses = [host.address for host in self.hosts]
        return addresses, str(self.ledger), self.seconds, self.sizes, self.apart


def _agent(place: int, given: tuple[Any, ...], disk: Path, log: Path) -> None:
    """What our torchrun does on a host, with `--nnodes 1:N --max_restarts 100`."""
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    addresses, *run = given
    register()
    disk.mkdir(exist_ok=True)
    os.chdir(disk)
    os.setsid()
    with log.open("a") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # its fork, the worker, too
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=len(addresses),
        nproc_per_node=1,
        run_id="toy",
        rdzv_backend=BACKEND,
        rdzv_endpoint=f"{addresses[0]}:{PORT}",
        rdzv_configs={
            "is_host": place == 0,
            "join_timeout": 60,
            "last_call_timeout": 3,
            "keep_alive_interval": 1,
            "keep_alive_max_attempt": 10,
            PROCESSES: 1,
        },
        max_restarts=100,
        start_method="fork",
        local_addr=addresses[place],
    )
    launch_agent(config, _worker, run)


def _worker(ledger: str, seconds: float, sizes: Sizes, apart: bool) -> None:
    # Of a process that torchrun starts; a fork has its agent's, which waits for what hangs.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    with suppress(KeyboardInterrupt):
        train("run", ledger, seconds, sizes, save_on_each_node=apart, save_total_limit=3)
