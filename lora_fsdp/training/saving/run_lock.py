"""One run at a time in an output folder.

A run whose launcher was killed may still be writing its last checkpoint when the next one starts.
The lock is the system's own (`flock`): it ends with the process, however that ends, so a lock is
never left behind. The file says who holds it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lora_fsdp.errors import OutputFolderError, OutputFolderInUseError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lora-fsdp.lock"
WAIT_SECONDS = 60.0

# Folders that this process holds; holding one again is no conflict.
_held: dict[Path, IO[str]] = {}


def hold_folder(folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> None:
    """Hold the output folder until `release_folder`, or until the process ends.

    Raises:
        OutputFolderInUseError: another run holds it and does not end; the message names it.
        OutputFolderError: it cannot be written to.
    """
    place = folder.absolute()
    if place in _held:
        return
    file = place / LOCK_FILE
    until = time.monotonic() + wait_seconds
    waiting = False
    while (held := _try_lock(file)) is None:
        if time.monotonic() > until:
            raise OutputFolderInUseError(
                f"{folder} is in use by {_holder(file)}: wait for it to end, or choose another "
                "--output_dir."
            )
        if not waiting:
            logger.warning(
                "Waiting up to %.0f s for %s to leave %s.", wait_seconds, _holder(file), folder
            )
        waiting = True
        time.sleep(0.1)
    _held[place] = held


def release_folder(folder: Path) -> None:
    """Let go of a folder that this process holds."""
    held = _held.pop(folder.absolute(), None)
    if held is not None:
        # In a folder that has become read-only it stays; the lock itself ends with the process.
        with held, suppress(OSError):
            (folder.absolute() / LOCK_FILE).unlink()


def holder_of(folder: Path) -> str | None:
    """The other run that writes into the folder now, in words; nothing is made or removed."""
    file = folder.absolute() / LOCK_FILE
    if folder.absolute() in _held or not file.is_file():
        return None
    try:
        with file.open("r") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(file)
    except OSError:  # not readable, or a file system without locks
        return None
    return None


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the output folder; nothing is done where this process holds it already."""
    if folder.absolute() in _held:
        yield
        return
    hold_folder(folder)
    try:
        yield
    finally:
        release_folder(folder)


def _try_lock(file: Path) -> IO[str] | None:
    """The open and locked file; `None` if another process has it.

    Raises:
        OutputFolderError: the folder cannot be written to, or holds something else by that name.
    """
    opened = _open_own(file)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        return None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s).", file.parent, error.strerror)
        return opened
    # The holder removes the file when it is done: what was waited for may not be there any more.
    if not file.exists() or not os.path.samestat(file.stat(), os.fstat(opened.fileno())):
        opened.close()
        return None
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    try:
        opened.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, opened)
        opened.flush()
    except OSError as error:  # a full disk
        file.unlink()
        with suppress(OSError):  # which would write what is left once more
            opened.close()
        raise _not_writable(file.parent, error) from error
    return opened


def _open_own(file: Path) -> IO[str]:
    """The lock file, made if there is none; never a file that somebody else has made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink() or (file.is_file() and file.stat().st_size and not _is_ours(file)):
            raise OutputFolderError(
                f"{file} is not a lock that a run has left: move it away, or choose another "
                "--output_dir."
            )
        return file.open("a", encoding="utf-8")
    except OutputFolderError:
        raise
    except OSError as error:
        raise _not_writable(file.parent, error) from error


def _is_ours(file: Path) -> bool:
    begin = '{"pid": '
    found = file.read_text(encoding="utf-8", errors="replace")[: len(begin)]
    return begin.startswith(found)  # one that is just being written may be cut off


def _not_writable(folder: Path, error: OSError) -> OutputFolderError:
    return OutputFolderError(
        f"{folder} cannot be written to ({error.strerror}): make room, or choose another "
        "--output_dir."
    )


def _holder(file: Path) -> str:
    """Who holds the lock, as far as the file says."""
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
