"""A disk that is full at any moment, and what others left there: one sentence, nothing lost.

Run: python -m pytest -m "slow or not slow" tests/training/test_full_disk.py
"""

import json
import os
import resource
import shutil
import warnings
from pathlib import Path

import pytest
from transformers import TrainerCallback

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    LoraFsdpError,
    ModelArguments,
    finetune,
)
from lora_fsdp.arguments.option import check_is_text
from lora_fsdp.errors import (
    ArgumentError,
    CheckpointSaveError,
    DamagedCheckpointError,
    OutputFolderError,
)
from lora_fsdp.options import OptionParser
from lora_fsdp.training.logging.log_history import KeepLog
from lora_fsdp.training.saving.atomic_folders import MARKER, _digest_marker
from lora_fsdp.training.saving.checkpoints import newest_whole_checkpoint
from lora_fsdp.training.saving.run_lock import LOCK_FILE, hold_folder, release_folder
from tests.support.ranks import run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import toy_table

COLUMNS = {"text_column": "text", "label_column": "label", "instruction": "Say how it sounds:"}


def no_file_larger_than(size):
    """As on a full disk, writes beyond it fail; Python ignores the signal that comes with it."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


def print_nowhere():
    """Not into the files that pytest catches output in, which could not grow either."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    warnings.simplefilter("ignore")


def full_run(folder, base, size):
    """A whole run in a process whose files cannot grow beyond `size`; how it ended."""
    print_nowhere()
    no_file_larger_than(size)
    try:
        finetune(
            model_args=ModelArguments(str(base)),
            lora_args=LoraArguments(lora_r=4),
            data_args=DataArguments(
                task="classification", data_file=str(folder / "t.csv"), max_length=128, **COLUMNS
            ),
            training_args=FineTuningArguments(
                output_dir=str(folder / "run"), max_steps=4, save_strategy="steps", save_steps=2,
                logging_steps=1, disable_tqdm=True,
            ),
        )  # fmt: skip
    except LoraFsdpError as error:
        return type(error).__name__, str(error)
    finally:  # what counts coverage writes its own file when the process ends
        no_file_larger_than(resource.RLIM_INFINITY)
    return "done", ""


SIZES = [0, 500, 2_000, 30_000]


@pytest.mark.parametrize(
    "size", [pytest.param(n, marks=() if n in (0, 2_000) else pytest.mark.slow) for n in SIZES]
)
def test_a_full_disk_ends_a_run_in_a_sentence(tmp_path, model_folder, size):
    toy_table(24).to_csv(tmp_path / "t.csv", index=False)
    [(kind, sentence)] = run_ranks(full_run, tmp_path, model_folder, size, world_size=1)
    assert kind in (OutputFolderError.__name__, CheckpointSaveError.__name__), sentence
    assert "run" in sentence
    assert "cannot be written" in sentence
    assert "\n" not in sentence
    assert not list((tmp_path / "run").glob("*.partial"))
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_where_there_is_room_it_is_done(tmp_path, model_folder):
    """The sizes above are what ends those runs."""
    toy_table(24).to_csv(tmp_path / "t.csv", index=False)
    assert run_ranks(full_run, tmp_path, model_folder, 10**9, world_size=1) == [("done", "")]


class FullBetween(TrainerCallback):
    """No room while steps 2 and 3 are logged."""

    def __init__(self, file):
        self.file = file

    def on_step_end(self, args, state, control, **kwargs):
        no_file_larger_than(self.file.stat().st_size + 5 if state.global_step in (2, 3) else 10**9)


def run_with_full_disk_between(folder):
    print_nowhere()
    log = KeepLog(folder)
    trainer = toy_trainer(folder, max_steps=6, callbacks=[log, FullBetween(log.path)])
    trainer.train()
    return trainer.state.log_history


def test_the_log_waits_for_room_between_two_saves(tmp_path):
    [history] = run_ranks(run_with_full_disk_between, tmp_path, world_size=1)
    first, *kept = map(json.loads, (tmp_path / "log_history.jsonl").read_text().splitlines())
    assert first["max_steps"] == 6
    for entry in kept:
        del entry["time"]
    assert kept == history
    assert [entry["step"] for entry in kept] == [1, 2, 3, 4, 5, 6, 6]


# ---- what is read back ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    toy_trainer(folder, rows=8, max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder


SHAPES = {
    "a list": lambda marker: [1, 2],
    "a number": lambda marker: 5,
    "null": lambda marker: None,
    "another program's": lambda marker: {"name": "app", "version": 3, "files": ["a", "b"]},
    "empty": lambda marker: {},
    "no format": lambda marker: {k: v for k, v in marker.items() if k != "format"},
    "a later format": lambda marker: marker | {"format": 99},
    "format a list": lambda marker: marker | {"format": [1]},
    "no files": lambda marker: {k: v for k, v in marker.items() if k != "files"},
    "files a list": lambda marker: marker | {"files": ["a"]},
    "files of texts": lambda marker: marker | {"files": {"a": "b"}},
    "files without sizes": lambda marker: marker | {"files": {"a": {"sha256": "b"}}},
    "a file of a NUL": lambda marker: marker | {"files": {"a\0b": {"bytes": 1, "sha256": "b"}}},
    "no facts": lambda marker: {k: v for k, v in marker.items() if k != "facts"},
    "facts a text": lambda marker: marker | {"facts": "all"},
    "facts of another run's kind": lambda marker: marker | {"facts": {"step": 2}},
    "launch a list": lambda marker: marker | {"facts": marker["facts"] | {"launch": [8]}},
    "launch of texts": lambda marker: (
        marker | {"facts": marker["facts"] | {"launch": {"processes": "one"}}}
    ),
    "must_stay a list": lambda marker: marker | {"facts": marker["facts"] | {"must_stay": []}},
}


@pytest.mark.parametrize("signed", [True, False], ids=["with its digest", "without"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_marker_of_another_shape_is_passed_over(tmp_path, run_folder, shape, signed):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    file = folder / "checkpoint-2" / MARKER
    marker = json.loads(file.read_text())
    digest = marker.pop("sha256")
    changed = SHAPES[shape](marker)
    if isinstance(changed, dict) and signed:
        changed = {**changed, "sha256": _digest_marker(changed)}
    elif isinstance(changed, dict):
        changed = {**changed, "sha256": digest}
    file.write_text(json.dumps(changed))
    found, skipped = newest_whole_checkpoint(folder)
    assert found == folder / "checkpoint-1"
    assert len(skipped) == 1
    assert "checkpoint-2 (its " in skipped[0]
    shutil.rmtree(folder / "checkpoint-1")
    with pytest.raises(DamagedCheckpointError, match="holds no whole checkpoint"):
        newest_whole_checkpoint(folder)


def test_a_run_goes_on_from_the_older_checkpoint(tmp_path, run_folder):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / "checkpoint-2" / MARKER).write_text('{"jobs": [1, 2, 3]}')
    trainer = toy_trainer(folder, rows=8, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


# ---- files and names of others -------------------------------------------------------------------


def test_a_lock_file_of_the_users_own_is_left_alone(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    hold_folder(tmp_path)
    release_folder(tmp_path)
    assert (tmp_path / ".lock").read_text() == "mine"
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("kind", ["text", "link", "folder"])
def test_what_is_no_lock_of_ours_is_neither_written_nor_removed(tmp_path, kind):
    file, other = tmp_path / "run" / LOCK_FILE, tmp_path / "other"
    file.parent.mkdir()
    other.write_text("mine")
    if kind == "text":
        file.write_text("mine")
    elif kind == "link":
        file.symlink_to(other)
    else:
        file.mkdir()
    with pytest.raises(OutputFolderError, match=r"move it away|cannot be written to"):
        hold_folder(file.parent)
    assert other.read_text() == "mine"
    assert file.is_dir() if kind == "folder" else file.read_text() == "mine"


@pytest.mark.parametrize("left", ["", '{"pid', '{"pid": 1, "host": "gone", "since": "long ago"}'])
def test_a_lock_that_a_killed_run_left_is_taken(tmp_path, left):
    (tmp_path / LOCK_FILE).write_text(left)
    hold_folder(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    release_folder(tmp_path)


NOT_UTF8 = os.fsdecode(b"tab\xffle")


def test_names_that_are_not_utf8_are_refused_by_option(tmp_path, model_folder):
    parser = OptionParser((ModelArguments, DataArguments, FineTuningArguments))
    for words in (["--data_file", NOT_UTF8], [f"--output_dir={NOT_UTF8}"], ["--labels", NOT_UTF8]):
        option = words[0].partition("=")[0]
        with pytest.raises(ArgumentError, match=rf"{option} 'tab\\udcffle' is not UTF-8") as error:
            parser.parse(words)
        str(error.value).encode()
    with pytest.raises(ArgumentError, match=r"--output_dir .* is not UTF-8: rename"):
        FineTuningArguments(output_dir=str(tmp_path / NOT_UTF8))
    with pytest.raises(ArgumentError, match=r"--data_file .* is not UTF-8: rename"):
        finetune(
            model_args=ModelArguments(str(model_folder)),
            lora_args=LoraArguments(),
            data_args=DataArguments(task="classification", data_file=NOT_UTF8, **COLUMNS),
            training_args=FineTuningArguments(output_dir=str(tmp_path / "run")),
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArgumentError, match=r"--data_file .* NUL"):
        check_is_text("data_file", "a\0b")


def test_a_users_files_with_such_names_are_no_hindrance(tmp_path):
    Path(tmp_path / NOT_UTF8).write_text("mine")
    trainer = toy_trainer(tmp_path, rows=8, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / MARKER).is_file()
    assert Path(tmp_path / NOT_UTF8).read_text() == "mine"
