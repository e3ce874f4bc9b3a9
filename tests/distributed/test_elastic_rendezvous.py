"""What is added to torch's rendezvous: machines that are gone are noticed at any time.

Run (as root): python -m pytest tests/distributed/test_elastic_rendezvous.py
"""

from __future__ import annotations

import os
import time

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters

from lora_fsdp.cli.torchrun import main
from lora_fsdp.distributed import elastic, lost_hosts
from lora_fsdp.errors import LaunchError, RankMismatchError
from tests.support.hosts import hosts
from tests.support.ranks import start_on

PORT = 29500


def rendezvous(both, place, *, processes=1):
    """As our torchrun makes it."""
    elastic.register()
    return elastic._create(
        RendezvousParameters(
            elastic.BACKEND, f"{both[0]}:{PORT}", "toy", 1, 2, both[place],
            is_host=place == 0, join_timeout=60, last_call_timeout=1, keep_alive_interval=1,
            keep_alive_max_attempt=4, processes=processes,
        )
    )  # fmt: skip


def write(folder, name, text):
    file = folder / f"{name}.partial"
    file.write_text(text)
    file.rename(folder / name)


def read(folder, name, *, seconds=200):
    until = time.monotonic() + seconds
    while not (folder / name).exists():
        assert time.monotonic() < until, f"no {name} among {os.listdir(folder)}"
        time.sleep(0.05)
    return (folder / name).read_text()


def wait_for_round(folder, place, *, of, since=0.0):
    """Until a machine is in a round of so many; one that comes late makes a round of its own."""
    until = time.monotonic() + 200
    while not any(
        file.read_text() == str(of) and file.stat().st_mtime > since
        for file in folder.glob(f"{place}-round-?")
    ):
        assert time.monotonic() < until, sorted(os.listdir(folder))
        time.sleep(0.05)


def stay(both, place, folder):
    """Meet, as often as machines come or go; say of each round how many are in it."""
    lost_hosts.LOST_SECONDS = 3
    met = rendezvous(both, place)
    try:
        for count in range(10):
            write(folder, f"{place}-round-{count}", str(met.next_rendezvous().world_size))
            while not met.num_nodes_waiting():
                time.sleep(0.1)
    except RendezvousConnectionError as error:
        write(folder, f"{place}-end", str(error))


def leave_untold(both, place, folder):
    """Gone when the round is settled, and the others do not know where to meet."""

    def end(_, store, rank, count):
        if count == 2:
            write(folder, f"{place}-told", "nothing")
            os._exit(0)
        return True

    elastic.ElasticRendezvous._all_there = end
    met = rendezvous(both, place)
    while True:
        met.next_rendezvous()
        while not met.num_nodes_waiting():
            time.sleep(0.1)


def start_more(both, place, folder):
    met = rendezvous(both, place, processes=1 + place)
    try:
        while True:
            met.next_rendezvous()
            while not met.num_nodes_waiting():
                time.sleep(0.1)
    except RankMismatchError as error:
        write(folder, f"{place}-end", str(error))
        read(folder, "1-end")  # the first one has the store


def start(machines, place, function, folder):
    addresses = [one.address for one in machines]
    return start_on(machines[place], function, addresses, place, folder, variables={})


@pytest.mark.distributed
@pytest.mark.slow
def test_a_machine_that_is_gone_is_a_change_like_one_that_comes(tmp_path):
    """torch's agents see it where processes fail only, which those that still start do not."""
    with hosts(2) as both:
        for place in range(2):
            start(both, place, stay, tmp_path)
        for place in range(2):
            wait_for_round(tmp_path, place, of=2)
        gone = time.time()
        both[1].kill()
        wait_for_round(tmp_path, 0, of=1, since=gone)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_machine_is_lost_before_all_know_where_to_meet(tmp_path):
    with hosts(2) as both:
        for place, function in enumerate((stay, leave_untold)):
            start(both, place, function, tmp_path)
        read(tmp_path, "1-told")
        wait_for_round(tmp_path, 0, of=1, since=(tmp_path / "1-told").stat().st_mtime)


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["cut", pytest.param("mute", marks=pytest.mark.slow)])
def test_the_first_machine_does_not_answer(tmp_path, way):
    """torch's store waits for it as long as the kernel sends anew: a quarter of an hour."""
    with hosts(2) as both:
        for place in range(2):
            start(both, place, stay, tmp_path)
        wait_for_round(tmp_path, 1, of=2)
        both[0].cut() if way == "cut" else both[0].mute(both)
        assert "connection to the C10d store has failed" in read(tmp_path, "1-end", seconds=60)


@pytest.mark.distributed
def test_all_start_as_many_processes(tmp_path):
    with hosts(2) as both:
        for place in range(2):
            start(both, place, start_more, tmp_path)
        for place in range(2):
            assert "different numbers of processes, [1, 2]" in read(tmp_path, f"{place}-end")


@pytest.mark.parametrize("words", [[], ["--standalone"], ["--rdzv_backend", "etcd"]])
def test_another_rendezvous(words):
    with pytest.raises(LaunchError, match="give --rdzv_backend c10d"):
        main([*words, "train.py"])
