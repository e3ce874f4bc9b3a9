"""One run at a time in an output folder.

A run whose launcher was killed may still be writing its last checkpoint when the next one starts.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK_FILE).open("a")
    except OSError as error:
        raise OutputFolderError(
            f"{folder} cannot be written to ({error.strerror}): choose another --output_dir."
        ) from error
    with opened:
        until = time.monotonic() + wait_seconds
        waiting = False
        while not _try_lock(opened.fileno()):
            if time.monotonic() > until:
                raise OutputFolderError(
                    f"Another run is writing into {folder}: end it, or choose another --output_dir."
                )
            if not waiting:
                logger.warning("Waiting for another run to leave %s.", folder)
            waiting = True
            time.sleep(0.2)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        logger.warning("The output folder cannot be locked (%s).", error.strerror)
    return True
