"""One run at a time in an output folder.

A run whose launcher was killed may still be writing its last checkpoint when the next one starts.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lora_fsdp.errors import OutputFolderError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
WAIT_SECONDS = 120.0


@contextmanager
def run_lock(folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the output folder; the system lets go of it when the process ends, however it ends.

    Raises:
        OutputFolderError: another run holds it and does not end, or it cannot be written to.
    """
    file = folder / LOCK_FILE
    until = time.monotonic() + wait_seconds
    waiting = False
    while (held := _try_lock(file)) is None:
        if time.monotonic() > until:
            raise OutputFolderError(
                f"Another run is writing into {folder}: end it, or choose another --output_dir."
            )
        if not waiting:
            logger.warning("Waiting for another run to leave %s.", folder)
        waiting = True
        time.sleep(0.1)
    with held:
        try:
            yield
        finally:
            # In a folder that has become read-only it stays; the lock itself ends with the process.
            with suppress(OSError):
                file.unlink()


def _try_lock(file: Path) -> IO[str] | None:
    """The open and locked file; `None` if another process has it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("a")
    except OSError as error:
        raise OutputFolderError(
            f"{file.parent} cannot be written to ({error.strerror}): choose another --output_dir."
        ) from error
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        return None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s).", file.parent, error.strerror)
        return opened
    # The holder removes the file when it is done: what was waited for may not be there any more.
    if file.exists() and os.path.samestat(file.stat(), os.fstat(opened.fileno())):
        return opened
    opened.close()
    return None
