"""A base's files read into the page cache while a run is still starting.

Processes import for seconds before any of them asks for a weight, and the disk is idle meanwhile.
A launcher begins at once, so that each byte is read from the disk once for all ranks of its host.
Nothing is kept and nothing is checked here: what is wrong with a file, its reader says.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

#: Set for the processes of a launcher that reads ahead for all of them.
READ_AHEAD = "LORA_FSDP_READ_AHEAD"
# As many as keep a network disk busy; a local one is with one.
_THREADS = 4
_CHUNK = 16 * 2**20
# Of the memory that is free now: what else is cached is of use, too.
_SHARE_OF_MEMORY = 0.5


def read_ahead(model: str, *, revision: str = "main") -> list[threading.Thread]:
    """Begin to read a model's safetensors files into the page cache; returns the threads.

    They end by themselves, and with the process. Files larger together than half of the memory that
    is free are read up to that. Of a model on the Hub, what has been downloaded is read.

    Args:
        model: its folder, or its name on the Hub.
        revision: on the Hub.
    """
    if not hasattr(os, "preadv"):  # macOS before 11, and Windows
        return []
    chunks = _Chunks(model, revision)
    threads = [
        threading.Thread(target=chunks.read, name=f"read ahead {place}", daemon=True)
        for place in range(_THREADS)
    ]
    for thread in threads:
        thread.start()
    return threads


def read_ahead_once(model: str, *, revision: str) -> None:
    """As `read_ahead`, of one process a host, where no launcher does."""
    if model and int(os.environ.get("LOCAL_RANK", "0")) <= 0 and READ_AHEAD not in os.environ:
        read_ahead(model, revision=revision)


class _Chunks:
    """The chunks of a model's files, each given to one thread."""

    def __init__(self, model: str, revision: str) -> None:
        self._lock = threading.Lock()
        self._left = _chunks_of(model, revision)

    def read(self) -> None:
        """Read chunks while there are any."""
        buffer = bytearray(_CHUNK)
        while (chunk := self._next()) is not None:
            file, offset, size = chunk
            with suppress(OSError), file.open("rb", buffering=0) as opened:
                if not _is_cached(opened.fileno(), offset, size):
                    os.preadv(opened.fileno(), [memoryview(buffer)[:size]], offset)

    def _next(self) -> tuple[Path, int, int] | None:
        with self._lock:
            return next(self._left, None)


def _chunks_of(model: str, revision: str) -> Iterator[tuple[Path, int, int]]:
    """File, offset and bytes, in the order in which they will be wanted."""
    allowed = int(_SHARE_OF_MEMORY * psutil.virtual_memory().available)
    for file in _files_of(model, revision):
        try:
            size = file.stat().st_size
        except OSError:
            continue
        for offset in range(0, size, _CHUNK):
            part = min(_CHUNK, size - offset)
            if (allowed := allowed - part) < 0:
                return
            yield file, offset, part


def _files_of(model: str, revision: str) -> list[Path]:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        # Here, because a launcher needs none of it for a folder.
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            found = snapshot_download(
                model, revision=revision, allow_patterns="*.safetensors", local_files_only=True
            )
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            return []
        folder = Path(found)
    return sorted(folder.glob("*.safetensors"))


def _is_cached(descriptor: int, offset: int, size: int) -> bool:
    """Whether a chunk seems to be in the page cache, by its ends and its middle."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    page = bytearray(1)
    try:
        for place in (offset, offset + size // 2, offset + size - 1):
            os.preadv(descriptor, [page], place, os.RWF_NOWAIT)
    except OSError:  # it would have to wait, or the file system cannot say
        return False
    return True
