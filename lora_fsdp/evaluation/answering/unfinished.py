"""A table's answers until all are there: a file for each chunk, in a folder beside the output.

A chunk's file is written beside and renamed, so that it is complete or not there; the chunks that
are there are done. At the end they are joined into the output, which also appears in one rename.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_fsdp.base.folders import read_json_object
from lora_fsdp.data.streams import Chunk, TableStream
from lora_fsdp.errors import ArgumentError, OutputFileError
from lora_fsdp.evaluation.outputs import write_atomically, write_json

_JOB_FILE = "job.json"


@dataclass(frozen=True)
class Unfinished:
    """The folder `<output>.partial`.

    Attributes:
        stream: the table.
        output: what the answers become.
        job: all that the answers depend on; those of another job are not gone on with.
    """

    stream: TableStream
    output: Path
    job: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where the chunks are."""
        return self.output.with_name(f"{self.output.name}.partial")

    def check_place(self, *, overwrite: bool) -> None:
        """Refuse to replace, or to go on with, what is not this job's.

        Raises:
            OutputFileError: says what is there.
        """
        target, folder = self.output, self.folder
        if target.is_dir():
            raise OutputFileError(f"{target} is a folder: name another --output.")
        self._refuse_other_folder()
        if overwrite:
            return
        if target.exists():
            raise OutputFileError(
                f"{target} is already there: name another --output, or replace it with --overwrite."
            )
        if (folder / _JOB_FILE).is_file() and (other := self._differing()):
            raise OutputFileError(
                f"{folder} holds a part of {target.name} that was made with another "
                f"{', '.join(other)}: start anew with --overwrite."
            )

    def begin(self, *, overwrite: bool) -> None:
        """Make the folder, or go on with the one that is there."""
        if overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _JOB_FILE, dict(self.job))

    def check_shared(self) -> None:
        """Refuse to answer chunks that the first process would not find, or of another table.

        Raises:
            OutputFileError: the folder is not the first one's, or what it was begun for is not
                here.
        """
        if not (self.folder / _JOB_FILE).is_file():
            raise OutputFileError(
                f"{self.folder} of the first process is not there on this machine: give an "
                "--output on a disk that all machines share."
            )
        if other := self._differing():
            raise OutputFileError(
                f"This machine has another {', '.join(other)} than the first one: give every "
                "process the same table, adapter and options."
            )

    def file_of(self, chunk: Chunk) -> Path:
        """Where a chunk's answers are, once they are there."""
        return self.folder / f"{chunk.first:012d}{self.output.suffix}"

    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]], *, unsure: int) -> None:
        """Write a chunk with its answers, of which `unsure` were left out."""
        file = self.file_of(chunk)
        if unsure:  # before the answers, which say that the chunk is done
            write_json(_unsure_file(file), {"unsure": unsure})
        write_atomically(file, partial(self.stream.write, chunk, added))

    def join(self, files: Sequence[Path]) -> int:
        """Join the chunks' files into the output; returns how many answers were left out."""
        unsure = sum(map(_unsure_of, files))
        write_atomically(self.output, lambda path: self.stream.join(files, path))
        shutil.rmtree(self.folder)
        return unsure

    def _differing(self) -> list[str]:
        """In what the folder's job is another one."""
        begun = read_json_object(self.folder, _JOB_FILE)
        return [name for name, value in self.job.items() if begun.get(name) != value]

    def _refuse_other_folder(self) -> None:
        """Refuse to write into, or remove, what an earlier prediction has not made."""
        folder = self.folder
        if not (folder.exists() or folder.is_symlink()):
            return
        ours = folder.is_dir() and not folder.is_symlink()
        if ours and not (folder / _JOB_FILE).is_file():  # killed before it wrote one
            ours = all(entry.name.startswith(f".{_JOB_FILE}.") for entry in folder.iterdir())
        if not ours:
            raise OutputFileError(
                f"{folder} is where unfinished answers would lie, and is not of an earlier "
                "prediction: move it away, or name another --output."
            )


def check_output_name(stream: TableStream, output: Path, *, what: str, option: str) -> None:
    """Refuse an output of another format than the table's, and the table itself.

    Args:
        stream: the table.
        output: the file.
        what: the table is called in messages.
        option: that names the output.

    Raises:
        ArgumentError, OutputFileError: says what to name.
    """
    suffix = stream.output_suffix
    if not output.name.lower().endswith(suffix):
        raise ArgumentError(
            f"{output} is no {suffix} file: the output has the {what}'s format, so that its rows "
            f"stay what they are; name it *{suffix}."
        )
    if output.exists() and output.samefile(stream.path):
        raise OutputFileError(f"{output} is the {what}: name another {option}.")


def _unsure_file(file: Path) -> Path:
    """How many rows of a chunk get no answer because of `Confidence.least`; none = 0."""
    return file.with_name(f"{file.name}.unsure.json")


def _unsure_of(file: Path) -> int:
    there = _unsure_file(file)
    return int(read_json_object(there.parent, there.name)["unsure"]) if there.is_file() else 0
