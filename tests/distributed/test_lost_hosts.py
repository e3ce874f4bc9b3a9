"""A host that is gone ends the others' processes, whatever they are waiting for.

Run (as root): python -m pytest tests/distributed/test_lost_hosts.py
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lora_fsdp.distributed import lost_hosts
from lora_fsdp.distributed.lost_hosts import EXIT_CODE, watching_hosts
from tests.support.hosts import hosts
from tests.support.ranks import start_on

pytestmark = pytest.mark.distributed
PORT = 29500


def variables(both, rank):
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(len(both)),
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(rank),
        "GROUP_WORLD_SIZE": str(len(both)),
        "MASTER_ADDR": both[0].address,
        "MASTER_PORT": str(PORT),
    }


def start(both, rank, function, folder):
    return start_on(both[rank], function, folder, variables=variables(both, rank))


def printed_to(folder):
    """This process's output into a file of its own."""
    opened = (folder / f"rank-{os.environ['RANK']}.txt").open("w")
    os.dup2(opened.fileno(), 2)
    sys.__stderr__ = os.fdopen(2, "w")


def sooner():
    lost_hosts.LOST_SECONDS, lost_hosts.START_SECONDS = 3, 6
    lost_hosts._GRACE_SECONDS = 2.0


def wait_for_all(folder):
    """The first waits for a tensor, the second is busy, as in evaluation or where it reads."""
    sooner()
    printed_to(folder)
    with watching_hosts():
        dist.init_process_group("gloo")
        dist.barrier()
        [watch] = lost_hosts._watches
        while not (watch.names if dist.get_rank() == 0 else watch.link):
            time.sleep(0.05)
        (folder / f"there-{dist.get_rank()}").touch()
        if dist.get_rank() == 1:
            while not (folder / "enough").exists():  # busy in Python: no thread need turn
                sum(range(100_000))
        dist.all_reduce(torch.zeros(1))


def end_alone(folder):
    """One process fails before the others wait for it, which no connection of gloo shows them."""
    sooner()
    printed_to(folder)
    with suppress(ZeroDivisionError), watching_hosts():
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], PORT, is_master=os.environ["RANK"] == "0",
            wait_for_workers=True, world_size=2,
        )  # fmt: skip
        time.sleep(3)
        (folder / f"there-{os.environ['RANK']}").touch()
        if os.environ["RANK"] == "1":
            raise ZeroDivisionError
        store.get("never")


def finish_first(folder):
    """The second process has nothing left to do, and the first one still writes."""
    sooner()
    printed_to(folder)
    rank = int(os.environ["RANK"])
    with watching_hosts():
        store = dist.TCPStore(os.environ["MASTER_ADDR"], PORT, is_master=rank == 0, world_size=2)
        [watch] = lost_hosts._watches
        while not (watch.names if rank == 0 else watch.link):
            time.sleep(0.05)
        (folder / f"there-{rank}").touch()
        while rank == 0 and not (folder / "written").exists():
            time.sleep(0.05)
    del store


def never_comes(folder):
    sooner()
    printed_to(folder)
    with watching_hosts():
        dist.init_process_group("gloo")


def wait_until_there(folder, count, seconds=60):
    until = time.monotonic() + seconds
    while len(list(Path(folder).glob("there-*"))) < count:
        assert time.monotonic() < until
        time.sleep(0.05)


def ends(process, *, within):
    process.join(timeout=within)
    try:
        return process.exitcode
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("way", "lost"),
    [
        ("cut off", 1),
        ("half open", 0),
        pytest.param("cut off", 0, marks=pytest.mark.slow),
        pytest.param("half open", 1, marks=pytest.mark.slow),
    ],
)
def test_a_host_that_does_not_answer(tmp_path, way, lost):
    with hosts(2) as both:
        processes = [start(both, rank, wait_for_all, tmp_path) for rank in range(2)]
        wait_until_there(tmp_path, 2)
        if way == "cut off":
            both[lost].cut()
        else:
            both[lost].mute(both)
        codes = [ends(one, within=20) for one in processes]
    # The first that notices closes its connections, which gloo may show the other one.
    assert set(codes) in ({EXIT_CODE}, {EXIT_CODE, 1})
    said = "".join((tmp_path / f"rank-{rank}.txt").read_text() for rank in range(2))
    assert "LostHostError" in said
    assert "has not answered for 3 s" in said
    assert "--resume_from_checkpoint true" in said


def test_a_busy_host_is_not_lost(tmp_path):
    with hosts(2) as both:
        processes = [start(both, rank, wait_for_all, tmp_path) for rank in range(2)]
        wait_until_there(tmp_path, 2)
        time.sleep(6)
        (tmp_path / "enough").touch()
        assert [ends(one, within=20) for one in processes] == [0, 0]


def test_a_process_that_ends_before_the_others(tmp_path):
    with hosts(2) as both:
        first = start(both, 0, end_alone, tmp_path)
        time.sleep(0.5)
        other = start(both, 1, end_alone, tmp_path)
        wait_until_there(tmp_path, 2)
        assert ends(first, within=20) == EXIT_CODE
        other.join()
    assert "has ended before the run did" in (tmp_path / "rank-0.txt").read_text()


@pytest.mark.parametrize("lost", [False, True])
def test_none_leaves_before_the_first_process(tmp_path, lost):
    """Where that is lost in the last save, the others have to begin anew."""
    with hosts(2) as both:
        first, other = (start(both, rank, finish_first, tmp_path) for rank in range(2))
        wait_until_there(tmp_path, 2)
        time.sleep(1)
        assert other.is_alive()
        if lost:
            both[0].kill()
        else:
            (tmp_path / "written").touch()
            assert ends(first, within=20) == 0
        assert ends(other, within=20) == (EXIT_CODE if lost else 0)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_host_that_does_not_come(tmp_path, missing):
    with hosts(2) as both:
        there = start(both, 1 - missing, never_comes, tmp_path)
        assert ends(there, within=25) == EXIT_CODE
    said = (tmp_path / f"rank-{1 - missing}.txt").read_text()
    assert (
        "did not answer in 6 s" if missing == 0 else "did not start its processes in 6 s"
    ) in said


def test_one_host_is_not_watched(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with watching_hosts():
        assert not lost_hosts._watches
