"""Atomic folders: complete, or not there.

What is to be saved is written into a folder beside its place (`checkpoint-8.partial`), every file
is flushed to the disk, a marker with the size and SHA-256 of every file is written last, and only
then is the folder renamed. A process killed at any instant, a full disk or a power cut leaves
either the complete folder or a `.partial` one, which nothing reads and the next start removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from lora_fsdp.errors import (
    CheckpointSaveError,
    DamagedCheckpointError,
    LoraFsdpError,
    OutputFolderError,
)
from lora_fsdp.evaluation.outputs import write_text

MARKER = "manifest.json"
PARTIAL = ".partial"
REPLACED = ".replaced"
_FORMAT = 1
FINAL_FILES = ".adapter"  # never a folder: what is written under its name moves in file by file
# What a run names the folders that it writes atomically.
_OURS = rf"(checkpoint|diverged-step)-[0-9]+|{re.escape(FINAL_FILES)}"


@contextmanager
def atomic_folder(folder: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `folder` when it is complete.

    Args:
        folder: the place; a folder that is there already is kept until the new one stands.
        facts: what defines the folder's contents, for the marker.

    Raises:
        CheckpointSaveError: it cannot be written; `folder` is as it was.
    """
    with _draft(folder) as partial:
        yield partial
        _seal(partial, facts)
        _take_place(partial, folder)


@contextmanager
def atomic_files(folder: Path, facts: Mapping[str, Any], *, last: str) -> Iterator[Path]:
    """As `atomic_folder`, for files in a folder that also holds other things.

    They are moved in one by one, the file `last` at the end: without it nobody can take the others
    for complete, so it is also the first to go where a former set is replaced.
    """
    with _draft(folder, last=last) as partial:
        yield partial
        _seal(partial, facts)
        _move_files(partial, folder, last=last)


@contextmanager
def received_folder(folder: Path, *, last: str | None = None) -> Iterator[Path]:
    """As `atomic_folder`, for a copy whose marker comes with it; with `last`, as `atomic_files`.

    Raises:
        CheckpointSaveError: it cannot be written, or what arrived is not what its marker says.
    """
    with _draft(folder, last=last) as partial:
        yield partial
        for file in [path for path in partial.rglob("*") if path.is_file()]:
            _flush(file)
        try:
            check_whole(partial)
        except DamagedCheckpointError as error:
            raise CheckpointSaveError(f"{folder} did not arrive whole: {error}.") from error
        if last is None:
            _take_place(partial, folder)
        else:
            _move_files(partial, folder, last=last)


def add_file(folder: Path, name: str, text: str) -> None:
    """Add a file to what was saved in `folder`, and to its marker; both appear complete.

    Raises:
        DamagedCheckpointError: the folder has no marker, or a damaged one.
        CheckpointSaveError: it cannot be written.
    """
    with _clear_message(folder):
        marker = read_marker(folder)
        write_text(folder / name, text)
        size = (folder / name).stat().st_size
        marker["files"][name] = {"bytes": size, "sha256": _digest_file(folder / name)}
        write_text(folder / MARKER, _marker_text(marker))


def read_marker(folder: Path) -> dict[str, Any]:
    """The marker of a folder.

    Raises:
        DamagedCheckpointError: it is missing or unreadable.
    """
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        digest = marker.pop("sha256")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"its marker {MARKER} is missing") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"its marker {MARKER} cannot be read ({error})") from error
    if digest != _digest_marker(marker):
        raise DamagedCheckpointError(f"its marker {MARKER} is not as it was written")
    if marker.get("format") != _FORMAT:
        form = str(marker.get("format"))[:40]
        raise DamagedCheckpointError(f"its format is {form}, this version's {_FORMAT}")
    if not _has_our_form(marker):
        raise DamagedCheckpointError(f"its marker {MARKER} has another form than a run writes")
    return marker


def _has_our_form(marker: Mapping[str, Any]) -> bool:
    """Whether there are facts, and for each file its size and digest."""
    files = marker.get("files")
    return (
        isinstance(marker.get("facts"), dict)
        and isinstance(files, dict)
        and "\0" not in "".join(files)
        and all(
            isinstance(one, dict)
            and isinstance(one.get("bytes"), int)
            and isinstance(one.get("sha256"), str)
            for one in files.values()
        )
    )


def check_whole(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """The marker of a folder whose files are as they were written.

    Args:
        folder: the folder.
        hashes: compare the files' SHA-256, not their sizes alone.

    Raises:
        DamagedCheckpointError: says what is wrong, as the end of a sentence about the folder.
    """
    marker = read_marker(folder)
    for name, expected in marker["files"].items():
        file = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedCheckpointError(f"{name!r} is outside it")
        if file.is_symlink() or not file.is_file():
            raise DamagedCheckpointError(f"{name} is missing or no regular file")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise DamagedCheckpointError(f"{name} has {size} bytes instead of {expected['bytes']}")
        if hashes and _digest_file(file) != expected["sha256"]:
            raise DamagedCheckpointError(f"{name} is not as it was written (its SHA-256 differs)")
    return marker


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove what a killed process left half-written in `parent`; the paths removed.

    A folder that had made way for one that never took its place is put back. Folders of the user's
    own are left alone, whatever they end in.

    Raises:
        OutputFolderError: a link or a file has the name of such a folder.
    """
    removed = []
    for path in _made_here(parent, REPLACED):
        place = path.with_name(path.name.removesuffix(REPLACED))
        if os.path.lexists(place):
            shutil.rmtree(path)
            removed.append(path)
        else:
            path.rename(place)
    for path in _made_here(parent, PARTIAL):
        shutil.rmtree(path)
        removed.append(path)
    return removed


def remove_folder(folder: Path) -> None:
    """Remove a folder; killed in the middle, it leaves no damaged one under the folder's name."""
    doomed = folder.with_name(folder.name + PARTIAL)
    _make_way(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def is_ours(name: str) -> bool:
    """Whether a run gives this name to a folder that it writes."""
    return re.fullmatch(_OURS, name) is not None


def _made_here(parent: Path, suffix: str) -> list[Path]:
    """The folders in `parent` that a run names so; all of them are looked at before any goes."""
    found = [
        path
        for path in sorted(parent.iterdir() if parent.is_dir() else ())
        if path.name.endswith(suffix) and is_ours(path.name.removesuffix(suffix))
    ]
    for path in found:
        if path.is_symlink() or not path.is_dir():
            raise OutputFolderError(
                f"{path} is no folder, but has the name of one that a run writes: move it away, or "
                "choose another --output_dir."
            )
    return found


def _make_way(folder: Path) -> None:
    """Remove what an earlier attempt left under the name of a folder to be written."""
    _check_is_folder(folder)
    if folder.exists():
        shutil.rmtree(folder)


def _check_is_folder(place: Path) -> None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise FileExistsError(errno.EEXIST, f"{place.name} is there and no folder: move it away")


@contextmanager
def _draft(folder: Path, *, last: str | None = None) -> Iterator[Path]:
    """A folder to write into, of which nothing is left where that fails: beside `folder`, or, with
    the name of the `last` of its files, in it."""
    place = folder if last is None else folder / FINAL_FILES
    partial = place.with_name(place.name + PARTIAL)
    with _clear_message(folder):
        _make_way(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Flush every file and write the marker."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        _flush(file)
        name = file.relative_to(folder).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": _digest_file(file)}
    marker = {"format": _FORMAT, "facts": dict(facts), "files": files}
    (folder / MARKER).write_text(_marker_text(marker), encoding="utf-8")
    _flush(folder / MARKER)
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        _flush_folder(inner)
    _flush_folder(folder)


def _take_place(partial: Path, folder: Path) -> None:
    _check_is_folder(folder)
    replaced = folder.with_name(folder.name + REPLACED)
    makes_way = folder.exists()
    if makes_way:
        _make_way(replaced)
        folder.rename(replaced)
    partial.rename(folder)
    _flush_folder(folder.parent)
    if makes_way:
        shutil.rmtree(replaced)


def _move_files(partial: Path, folder: Path, *, last: str) -> None:
    (folder / last).unlink(missing_ok=True)
    names = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: (str(name) == last, name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    _flush_folder(folder)
    shutil.rmtree(partial)


def _flush(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _marker_text(marker: Mapping[str, Any]) -> str:
    return json.dumps({"sha256": _digest_marker(marker), **marker}, indent=2)


def _digest_marker(marker: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()


@contextmanager
def _clear_message(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers report the system's errors as text only.
        from_system = isinstance(error, OSError | SafetensorError) or "(os error" in str(error)
        if isinstance(error, LoraFsdpError) or not from_system:
            raise
        reason = _reason(error)
        raise CheckpointSaveError(
            f"{folder} cannot be written ({reason}): what was saved before is as it was. Make room "
            "or choose another --output_dir, then continue with --resume_from_checkpoint true."
        ) from error


# What the system says of a write that it cannot carry out, whatever file it is of.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Say in one sentence that a file of a run cannot be written, whichever it is.

    Raises:
        CheckpointSaveError: the disk is full, a quota is, or it has become read-only.
    """
    try:
        yield
    except Exception as error:
        codes = "|".join(map(str, _NO_ROOM))
        no_room = re.search(rf"\(os error ({codes})\)", str(error)) is not None
        if isinstance(error, LoraFsdpError) or not (
            no_room or (isinstance(error, OSError) and error.errno in _NO_ROOM)
        ):
            raise
        raise CheckpointSaveError(
            f"{folder} cannot be written to ({_reason(error)}): whole checkpoints are as they "
            "were. Make room or choose another --output_dir; a run that has a checkpoint continues "
            "with --resume_from_checkpoint true."
        ) from error


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
