"""Hosts with a disk each: what one has written, every other has, by its SHA-256.

Run: python -m pytest tests/training/test_separate_disks.py
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.errors import ArgumentError
from lora_fsdp.training.saving.atomic_folders import MARKER, check_whole
from tests.support.ranks import RankError, run_ranks
from tests.support.runs import toy_trainer

pytestmark = pytest.mark.distributed
TWO = [
    {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": str(place), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for place in range(2)
]


def train(folder, steps, resume=None, *, each=True):
    """A run whose rank sees its own disk only."""
    from lora_fsdp.ranks import host

    os.environ |= TWO[int(os.environ["RANK"])]  # a launcher of two machines says so
    mine = folder / ("disk" if each == "shared" else f"disk-{os.environ['RANK']}")
    mine.mkdir(parents=True, exist_ok=True)
    os.chdir(mine)
    trainer = toy_trainer(
        "run", max_steps=steps, save_strategy="steps", save_steps=2, save_total_limit=2,
        per_device_train_batch_size=2, save_on_each_node=bool(each),
    )  # fmt: skip
    assert host() == int(os.environ["RANK"])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.adapter.fingerprint()


def disks(folder):
    return [folder / f"disk-{place}" / "run" for place in range(2)]


def marker(folder, name):
    check_whole(folder / name)
    return (folder / name / MARKER).read_text()


def test_every_host_has_what_it_needs_to_go_on(tmp_path):
    run_ranks(train, tmp_path, 6)
    here, there = disks(tmp_path)
    for name in ("checkpoint-4", "checkpoint-6", "."):
        assert marker(here, name) == marker(there, name)  # which names every file's SHA-256
    for disk in (here, there):
        assert not (disk / "checkpoint-2").exists()  # the limit holds on each
        assert not list(disk.glob("*.partial"))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.slow
def test_a_host_comes_back_with_an_empty_disk(tmp_path, place):
    whole = run_ranks(train, tmp_path / "whole", 8)
    run_ranks(train, tmp_path, 4)
    shutil.rmtree(disks(tmp_path)[place])
    # As `if_any` finds it: the empty one knows of nothing to go on from.
    found = run_ranks(train_if_any, tmp_path, 8)
    assert found == whole
    assert marker(disks(tmp_path)[0], "checkpoint-8") == marker(disks(tmp_path)[1], "checkpoint-8")


def train_if_any(folder, steps):
    mine = folder / f"disk-{os.environ['RANK']}" / "run"
    given = FineTuningArguments(output_dir=str(mine), resume_from_checkpoint="if_any")
    return train(folder, steps, given.resume_from_checkpoint)


@pytest.mark.parametrize("harm", ["older", "damaged"])
def test_a_host_with_less_gets_the_newest(tmp_path, harm):
    whole = run_ranks(train, tmp_path / "whole", 8)
    run_ranks(train, tmp_path, 4)
    newest = disks(tmp_path)[0] / "checkpoint-4"
    if harm == "older":
        shutil.rmtree(newest)
    else:
        with (newest / "adapter_model.safetensors").open("r+b") as opened:
            opened.write(b"?")
    assert run_ranks(train, tmp_path, 8, True) == whole


@pytest.mark.parametrize("place", [0, 1])
def test_disks_that_nobody_said_are_apart(tmp_path, place):
    run_ranks(train, tmp_path, 4)
    shutil.move(disks(tmp_path)[place] / "checkpoint-4", tmp_path / "elsewhere")
    with pytest.raises(RankError, match="has checkpoint-2 as the newest there") as caught:
        run_ranks(train_apart, tmp_path)
    assert caught.value.kind == "RankMismatchError"
    assert "--save_on_each_node true" in caught.value.text


def train_apart(folder):
    return train(folder, 8, True, each=False)


def test_a_disk_that_all_share_is_written_once(tmp_path):
    run_ranks(train_shared, tmp_path, 4)
    assert marker(tmp_path / "disk" / "run", "checkpoint-4")
    run_ranks(train_shared, tmp_path, 6, True)
    assert marker(tmp_path / "disk" / "run", "checkpoint-6")


def train_shared(folder, steps, resume=None):
    return train(folder, steps, resume, each="shared")


def test_a_disk_without_room_is_named(tmp_path):
    with pytest.raises(RankError, match="cannot be written") as caught:
        run_ranks(train_on_a_file, tmp_path)
    assert caught.value.kind == "CheckpointSaveError"


def train_on_a_file(folder: Path):
    if os.environ["RANK"] == "1":
        (folder / "disk-1" / "run").mkdir(parents=True)
        (folder / "disk-1" / "run" / "checkpoint-2").write_text("in the way")
    return train(folder, 4)


def test_several_adapters_have_one_disk(tmp_path):
    with pytest.raises(ArgumentError, match="--save_on_each_node is for one adapter"):
        FineTuningArguments(output_dir=str(tmp_path), save_on_each_node=True, seeds=2)
