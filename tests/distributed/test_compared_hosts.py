"""A host that has something else than the others is named before anything is read.

Run (as root): python -m pytest tests/distributed/test_compared_hosts.py
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import pytest

from lora_fsdp.distributed.hosts import HostRecord, compare_hosts, differences, recognise
from tests.support.host_runs import prepare, training_words
from tests.support.hosts import finish, hosts
from tests.support.ranks import RankError, run_ranks

PATHS = {"model_name_or_path": "models/seven", "data_file": "rows.csv"}
SAME = HostRecord(
    "gpu-a",
    {"model_name_or_path": "aaaa", "data_file": "bbbb"},
    {"torch": "2.13.0", "peft": "0.21.0"},
    "yaml",
    1000.0,
)


def others(**changes):
    return [SAME, replace(SAME, name="gpu-b"), replace(SAME, name="gpu-c", **changes)]


def test_the_same_is_nothing_to_say():
    assert differences(others(), paths=PATHS) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": SAME.files | {"model_name_or_path": "missing"}},
         "gpu-c has no --model_name_or_path models/seven: copy it there from gpu-a."),
        ({"files": SAME.files | {"model_name_or_path": "cccc"}},
         "gpu-c has another --model_name_or_path models/seven than gpu-a"),
        ({"files": SAME.files | {"data_file": "dddd"}},
         "gpu-c has another --data_file rows.csv than gpu-a"),
        ({"versions": SAME.versions | {"peft": "0.20.0"}},
         "gpu-c has peft 0.20.0, gpu-a has 0.21.0: install the same"),
        ({"versions": {"torch": "2.13.0"}}, "gpu-c has peft not installed"),
        ({"yaml": "other"}, "gpu-c was started with other settings of the accelerate YAML"),
        ({"clock": 940.0}, "gpu-c's clock is -60 s off"),
    ],
)  # fmt: skip
def test_what_is_otherwise_is_named(changes, said):
    [sentence] = differences(others(**changes), paths=PATHS)
    assert sentence.startswith(said)


def test_the_odd_one_may_be_the_first():
    records = others()
    records[0] = replace(SAME, files=SAME.files | {"data_file": "dddd"})
    [sentence] = differences(records, paths=PATHS)
    assert sentence.startswith("gpu-a has another --data_file rows.csv than gpu-b")


def test_a_name_on_the_hub_is_on_no_host():
    files = {"model_name_or_path": "missing", "data_file": "bbbb"}
    records = [replace(one, files=files) for one in others()]
    assert differences(records, paths=PATHS) == []


def test_large_files_are_recognised_by_samples(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.truncate(100 * 2**20)  # holes: nothing is stored
    before = recognise(tmp_path)
    assert recognise(tmp_path) == before
    with file.open("r+b") as opened:
        opened.seek(-10, 2)
        opened.write(b"x")
    assert recognise(tmp_path) != before
    (tmp_path / "more.json").write_text("{}")
    assert recognise(tmp_path / "none") == "missing"


def compared(paths):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    compare_hosts(paths)


@pytest.mark.distributed
def test_hosts_that_have_the_same_go_on(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    with hosts(2) as both:
        run_ranks(compared, {"data_file": str(tmp_path / "rows.csv")}, world_size=4, hosts=both)


@pytest.mark.distributed
def test_ranks_of_two_hosts_with_other_versions(tmp_path):
    with hosts(2) as both, pytest.raises(RankError) as caught:
        run_ranks(with_another_version, world_size=4, hosts=both)
    assert caught.value.kind == "RankMismatchError"
    assert "has peft 0.0.1" in caught.value.text


def with_another_version():
    import os

    from lora_fsdp.distributed import hosts as room

    real = room.version
    if os.environ["GROUP_RANK"] == "1":
        room.version = lambda name: "0.0.1" if name == "peft" else real(name)
    compared({})


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", ["no model", "another model", "other rows"])
def test_the_whole_way(tmp_path, case):
    """By the launcher: every host ends, in time, and the sentence names host1."""
    recipe = prepare(tmp_path)
    there, mine = tmp_path / "model", tmp_path / "of-host1"
    mine.mkdir()
    if case == "other rows":
        there, mine = tmp_path / "rows.csv", mine / "rows.csv"
        shutil.copy(there, mine)
        with mine.open("a") as opened:
            opened.write("the crew was good,positive\n")
    elif case == "another model":
        shutil.copytree(there, mine, dirs_exist_ok=True)
        weights = bytearray((mine / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (mine / "model.safetensors").write_bytes(weights)
    with hosts(2) as both:
        began = time.monotonic()
        processes = []
        for place, host in enumerate(both):
            words = training_words(
                "torchrun", both, place, recipe=recipe, output=tmp_path / "run", ranks=2
            )
            instead = {there: mine} if place == 1 else None
            processes.append(host.start(words, instead=instead))
        printed = "".join(finish(processes, seconds=200))
        seconds = time.monotonic() - began
    said = {
        "no model": "host1 has another --model_name_or_path",  # an empty folder is there
        "another model": "host1 has another --model_name_or_path",
        "other rows": "host1 has another --data_file",
    }
    assert said[case] in printed, printed
    assert all(process.returncode for process in processes)
    assert seconds < 60
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
