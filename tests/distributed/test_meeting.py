"""Launchers of several machines meet before any of them starts a process.

Run: python -m pytest tests/distributed/test_meeting.py
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
import yaml

from lora_fsdp.cli.train import LaunchOptions, launch_command_line
from lora_fsdp.distributed.launch_files import launch_words, read_launch
from lora_fsdp.distributed.meeting import Meeting, check_meeting
from lora_fsdp.errors import LaunchError
from tests.support.hosts import finish, hosts
from tests.support.ranks import CONFIGS

HOSTS = CONFIGS / "fsdp2_hosts.yaml"
GIVEN = LaunchOptions(accelerate_config="fsdp2_hosts", machine_rank=0, main_process_ip="127.0.0.1")


def free_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(*meetings, settings=None, seconds=10.0):
    """What each of them says in the end, and how long it took."""
    said = {}

    def one(number, meeting):
        try:
            check_meeting(meeting, settings=(settings or {}).get(number, ""), seconds=seconds)
            said[number] = "starts"
        except LaunchError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(meetings)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    return [said[number] for number in range(len(meetings))], time.monotonic() - began


def meeting(place=0, **changes):
    return replace(Meeting(2, place, "127.0.0.1", 0, 4), **changes)


def test_two_that_agree_start_and_leave_the_port_free():
    port = free_port()
    for _ in range(2):  # at once again, as training will
        said, seconds = meet(meeting(0, port=port), meeting(1, port=port))
        assert said == ["starts", "starts"]
        assert seconds < 5


def test_the_second_may_come_first():
    port = free_port()
    said, _ = meet(meeting(1, port=port), meeting(0, port=port))
    assert said == ["starts", "starts"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"processes": 8}, "another num_processes: 8 there and 4 on"),
        ({"machines": 3}, "another num_machines: 3 there and 2 on"),
    ],
)
def test_other_world_sizes(changes, words):
    port = free_port()
    said, _ = meet(meeting(0, port=port), meeting(1, port=port, **changes))
    assert said[0] == said[1]
    assert "(--machine_rank 1)" in said[0]
    assert words in said[0]


def test_another_yaml():
    port = free_port()
    pair = meeting(0, port=port), meeting(1, port=port)
    said, _ = meet(*pair, settings={0: "reshard", 1: "keep"})
    assert said[0] == said[1]
    assert "another accelerate YAML than" in said[0]


def test_a_machine_rank_twice():
    port, three = free_port(), {"machines": 3, "processes": 6}
    said, seconds = meet(*(meeting(place, port=port, **three) for place in (0, 1, 1)), seconds=20.0)
    assert all("--machine_rank 1 is given twice" in one for one in (said[0], said[2])), said
    assert seconds < 15


def test_one_that_does_not_come():
    port = free_port()
    said, seconds = meet(meeting(0, port=port), seconds=1.0)
    assert "--machine_rank 1 did not come to 127.0.0.1" in said[0]
    assert seconds < 5


def test_a_first_machine_that_is_not_there():
    said, seconds = meet(meeting(1, port=free_port()), seconds=1.0)
    assert "could not reach 127.0.0.1" in said[0]
    assert "Connection refused" in said[0]
    assert seconds < 5


def test_a_port_that_is_taken():
    with closing(socket.socket()) as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        said, _ = meet(meeting(0, port=port), seconds=2.0)
    assert f"main_process_port: {port} is taken on this machine" in said[0]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("no-such-host.invalid", "does not resolve"),
        ("bad..name", "does not resolve"),
        ("::1", "has only IPv6 addresses"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_addresses_that_cannot_be_met_at(address, words, place):
    said, seconds = meet(meeting(place, address=address, port=free_port()), seconds=30.0)
    assert words in said[0]
    assert seconds < 15


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"main_process_port": 0}, "main_process_port: 0 with 2 machines"),
        ({"main_process_port": 70000}, "70000 is no port"),
        ({"main_process_ip": None}, "give --main_process_ip"),
        ({"machine_rank": None}, "give --machine_rank 0 on the first"),
        ({"machine_rank": 2}, "--machine_rank 2: with 2 machines"),
        ({"machine_rank": -1}, "--machine_rank -1: with 2 machines"),
        ({"num_processes": 5}, "5 processes .* cannot be divided between 2 machines|are 4, but"),
        ({"accelerate_config": "ddp"}, "but there is one machine"),
    ],
)
def test_options_that_cannot_be(changes, words):
    with pytest.raises(LaunchError, match=words):
        launch_command_line(replace(GIVEN, **changes), [])


@pytest.mark.parametrize("value", ["first", [1], 1.5])
def test_a_yaml_with_a_port_that_is_none(tmp_path, value):
    file = tmp_path / "hosts.yaml"
    file.write_text(
        yaml.safe_dump(yaml.safe_load(HOSTS.read_text()) | {"main_process_port": value})
    )
    with pytest.raises(LaunchError):
        launch_command_line(replace(GIVEN, accelerate_config=str(file)), [])


def test_the_yaml_s_own_port_is_kept():
    """A port for one machine is any free one; several have to agree on it."""
    words = launch_command_line(GIVEN, [])
    assert words[words.index("--main_process_port") + 1] == "29500"
    assert words[words.index("--machine_rank") + 1] == "0"
    alone = launch_command_line(LaunchOptions(accelerate_config="fsdp2_cpu"), [])
    assert alone[alone.index("--main_process_port") + 1] == "0"


def test_more_machines_have_more_copies():
    words = launch_words(HOSTS, processes=32, machines=4)
    launch = read_launch(HOSTS, processes=32, machines=4)
    assert words[-4:] == [
        "--parallelism_config_dp_replicate_size", "4", "--parallelism_config_dp_shard_size", "8",
    ]  # fmt: skip
    assert launch.environment["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "4"
    assert launch.environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"
    assert (launch.machines, launch.processes_here) == (4, 8)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_network_without_a_way(tmp_path):
    """The cable is pulled: each machine says so itself, in time, and no model was read."""
    with hosts(2) as both:
        both[1].cut()
        words = ["-m", "lora_fsdp", "train", "--accelerate_config", "fsdp2_hosts"]
        words += ["--main_process_ip", both[0].address, "--join_seconds", "5"]
        began = time.monotonic()
        processes = [
            host.start([sys.executable, *words, "--machine_rank", str(place), "--task", "x"])
            for place, host in enumerate(both)
        ]
        printed = finish(processes, seconds=60)
        assert time.monotonic() - began < 60
    assert [process.returncode for process in processes] == [2, 2]
    assert "--machine_rank 1 did not come to 10.77.0.1:29500" in printed[0]
    assert "host1 (--machine_rank 1) could not reach 10.77.0.1:29500" in printed[1]
