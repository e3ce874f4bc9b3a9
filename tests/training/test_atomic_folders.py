"""Folders that are whole or not there.

Run: python -m pytest tests/training/test_atomic_folders.py
"""

import json
import os
import resource
import shutil

import pytest
import torch

from lora_fsdp.errors import (
    CheckpointError,
    CheckpointSaveError,
    DamagedCheckpointError,
    OutputFolderError,
)
from lora_fsdp.training.saving.atomic_folders import (
    MARKER,
    atomic_files,
    atomic_folder,
    check_whole,
    remove_leftovers,
)
from lora_fsdp.training.saving.checkpoints import (
    check_named_checkpoint,
    list_checkpoints,
    newest_whole_checkpoint,
    remove_old_checkpoints,
)
from lora_fsdp.training.saving.state_file import read_state, write_state

# As a run's, in short.
FACTS = {"step": 1, "launch": {"processes": 1}, "must_stay": {}, "may_change": {}}


def write(folder, content=b"weights"):
    with atomic_folder(folder, FACTS) as partial:
        (partial / "a.bin").write_bytes(content)
        (partial / "inner").mkdir()
        (partial / "inner" / "b.bin").write_bytes(content * 100)
    return folder


def test_atomic_folder_says_what_it_holds(tmp_path):
    marker = check_whole(write(tmp_path / "checkpoint-1"))
    assert marker["facts"] == FACTS
    assert marker["files"].keys() == {"a.bin", "inner/b.bin"}
    assert marker["files"]["a.bin"]["bytes"] == 7


def truncate(folder):
    os.truncate(folder / "inner/b.bin", 5)


def flip(folder):
    content = bytearray((folder / "a.bin").read_bytes())
    content[3] ^= 1
    (folder / "a.bin").write_bytes(content)


def swap_for_link(folder):
    shutil.copy(folder / "a.bin", folder.parent / "elsewhere")
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to(folder.parent / "elsewhere")


def rewrite_marker(**changes):
    def damage(folder):
        marker = json.loads((folder / MARKER).read_text())
        (folder / MARKER).write_text(json.dumps(marker | changes))

    return damage


DAMAGES = {
    "truncated": (truncate, "has 5 bytes instead of 700"),
    "flipped": (flip, "SHA-256 differs"),
    "missing": (lambda folder: (folder / "a.bin").unlink(), "missing"),
    "link": (swap_for_link, "no regular file"),
    "no marker": (lambda folder: (folder / MARKER).unlink(), "marker manifest.json is missing"),
    "empty marker": (lambda folder: (folder / MARKER).write_text(""), "cannot be read"),
    "marker of another shape": (lambda folder: (folder / MARKER).write_text("[1]"), "cannot be"),
    "changed marker": (rewrite_marker(facts={"step": 2}), "not as it was written"),
    "outside": (rewrite_marker(files={"../../x": {}}), "not as it was written"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(tmp_path, name):
    damage, message = DAMAGES[name]
    write(tmp_path / "checkpoint-3")
    damage(write(tmp_path / "checkpoint-10"))
    with pytest.raises(DamagedCheckpointError, match=message):
        check_whole(tmp_path / "checkpoint-10")
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest.name == "checkpoint-3"
    assert len(skipped) == 1
    assert skipped[0].startswith("checkpoint-10 (")
    with pytest.raises(DamagedCheckpointError, match=r"Cannot resume from .*checkpoint-10"):
        check_named_checkpoint(tmp_path / "checkpoint-10")
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.raises(DamagedCheckpointError, match="no whole checkpoint"):
        newest_whole_checkpoint(tmp_path)


def test_a_path_out_of_the_folder_is_refused(tmp_path):
    """Even with a marker whose own hash is right."""
    (tmp_path / "secret").write_text("x")
    with atomic_folder(tmp_path / "checkpoint-1", {}) as partial:
        (partial / "a").write_text("x")
    from lora_fsdp.training.saving import atomic_folders

    marker = json.loads((tmp_path / "checkpoint-1" / MARKER).read_text())
    del marker["sha256"]
    marker["files"]["../secret"] = marker["files"].pop("a")
    signed = {"sha256": atomic_folders._digest_marker(marker), **marker}
    (tmp_path / "checkpoint-1" / MARKER).write_text(json.dumps(signed))
    with pytest.raises(DamagedCheckpointError, match="outside"):
        check_whole(tmp_path / "checkpoint-1")


def fail_to_write(writer, name):
    with writer as partial:
        (partial / name).write_text("half")
        raise RuntimeError("the writer fails")


def test_failing_writer_leaves_what_was_there(tmp_path):
    folder = write(tmp_path / "checkpoint-1", b"before")
    with pytest.raises(RuntimeError, match="writer"):
        fail_to_write(atomic_folder(folder, {}), "a.bin")
    assert check_whole(folder)
    assert (folder / "a.bin").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_no_room_is_one_sentence(tmp_path):
    """A file-size limit stands for a full disk: the write itself fails."""
    folder = write(tmp_path / "checkpoint-1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointSaveError, match="cannot be written") as caught:
            write(tmp_path / "checkpoint-2", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(caught.value)
    assert "--output_dir" in str(caught.value)
    assert list_checkpoints(tmp_path) == [folder]
    assert not list(tmp_path.glob("*.partial"))


def test_a_second_one_takes_the_place_of_the_first(tmp_path):
    write(tmp_path / "checkpoint-1", b"one")
    write(tmp_path / "checkpoint-1", b"two")
    assert check_whole(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "a.bin").read_bytes() == b"two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_leftovers_are_removed_and_what_made_way_comes_back(tmp_path):
    """As killed between the two renames, and as killed after them."""
    write(tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-2.replaced")
    write(tmp_path / "checkpoint-3")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-3.replaced")
    (tmp_path / "checkpoint-4.partial").mkdir()
    removed = remove_leftovers(tmp_path)
    assert {path.name for path in removed} == {"checkpoint-3.replaced", "checkpoint-4.partial"}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-2"]
    assert check_whole(tmp_path / "checkpoint-2")


OWN = ("notes.partial", "checkpoint-old.replaced", "adapter.partial", "checkpoint-1.partial.zip")


@pytest.mark.parametrize("name", OWN)
def test_folders_of_the_users_own_are_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("three years of work")
    assert remove_leftovers(tmp_path) == []
    assert (tmp_path / name / "thesis.txt").read_text() == "three years of work"


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
@pytest.mark.parametrize("name", ["checkpoint-2.partial", "checkpoint-2.replaced"])
def test_what_is_no_folder_but_named_like_ours_is_one_sentence(tmp_path, kind, name):
    elsewhere = tmp_path / "elsewhere"
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-1.partial").mkdir()
    if kind == "link":
        write(elsewhere)
    if kind == "file":
        (run / name).write_text("mine")
    else:
        (run / name).symlink_to(elsewhere)
    with pytest.raises(OutputFolderError, match=f"{name} is no folder"):
        remove_leftovers(run)
    assert os.path.lexists(run / name)
    assert (kind != "link") or check_whole(elsewhere)


@pytest.mark.parametrize("suffix", ["", ".partial", ".replaced"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_nothing_is_written_over_what_is_no_folder(tmp_path, suffix, kind):
    write(tmp_path / "checkpoint-1", b"one")
    place = tmp_path / f"checkpoint-1{suffix}"
    if not suffix:
        place.rename(tmp_path / "elsewhere")
    if kind == "file":
        place.write_text("mine")
    else:
        write(tmp_path / "elsewhere", b"one")
        place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointSaveError, match=f"{place.name} is there and no folder"):
        write(tmp_path / "checkpoint-1", b"two")
    kept = place if kind == "file" else tmp_path / "elsewhere" / "a.bin"
    assert kept.read_bytes() == (b"mine" if kind == "file" else b"one")
    assert place.is_symlink() == (kind == "link")


def test_a_checkpoint_that_is_a_link_is_read_and_never_removed(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(write(elsewhere), target_is_directory=True)
    assert newest_whole_checkpoint(run)[0] == run / "checkpoint-1"
    for step in (2, 3):
        write(run / f"checkpoint-{step}")
    remove_old_checkpoints(run, limit=1, keep={run / "checkpoint-3"})
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-3", "checkpoint-1"]
    assert check_whole(elsewhere)


def test_files_among_others_are_whole_or_have_no_last(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    for content in ("one", "two"):
        with atomic_files(tmp_path, {}, last="config.json") as partial:
            (partial / "config.json").write_text(content)
            (partial / "weights").write_text(content)
            assert (tmp_path / "metrics.json").exists()
        assert check_whole(tmp_path)
        assert (tmp_path / "weights").read_text() == content
    with pytest.raises(RuntimeError, match="writer"):
        fail_to_write(atomic_files(tmp_path, {}, last="config.json"), "weights")
    assert check_whole(tmp_path)
    assert (tmp_path / "weights").read_text() == "two"


def test_retention_keeps_newest_best_and_damaged(tmp_path):
    folders = {step: write(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 10, 20)}
    (folders[20] / MARKER).unlink()
    remove_old_checkpoints(tmp_path, limit=2, keep={folders[10], folders[1]})
    left = [path.name for path in list_checkpoints(tmp_path)]
    assert left == ["checkpoint-20", "checkpoint-10", "checkpoint-1"]
    remove_old_checkpoints(tmp_path, limit=1, keep={folders[10]})
    assert newest_whole_checkpoint(tmp_path)[0] == folders[10]


def test_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "a": shared, "b": shared[2:]}},
        "betas": (0.9, 0.1 + 0.2),
        "worst": float("inf"),
        "nothing": [None, True, "text", {}],
        "bits": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    write_state(tmp_path / "s", state)
    back = read_state(tmp_path / "s")
    assert back["betas"] == state["betas"]
    assert isinstance(back["betas"], tuple)
    assert (back["worst"], back["nothing"]) == (float("inf"), [None, True, "text", {}])
    assert list(back["state"]) == [0]
    assert torch.equal(back["state"][0]["b"], shared[2:])
    assert back["state"][0]["step"].shape == ()
    assert back["bits"].dtype == torch.bfloat16


def test_state_of_unknown_kind_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="complex"):
        write_state(tmp_path / "s", {"a": 1j})


def test_pickle_in_place_of_state_is_never_loaded(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"state": Malicious()}, tmp_path / "s")
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        read_state(tmp_path / "s")
    assert not (tmp_path / "owned").exists()
