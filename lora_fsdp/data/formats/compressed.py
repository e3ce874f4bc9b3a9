"""What a table file is by its name, and its bytes: plain, compressed, or one file of an archive."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from lora_fsdp.errors import UnsafeFileError, UnsupportedTableError

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Beyond both, a file is no table that somebody compressed: text shrinks to a tenth or a fiftieth.
_MOST_BYTES, _MOST_TIMES = 1 << 30, 300
_CHUNK = 1 << 20
# Of macOS' and Windows' own making.
_NO_TABLES = ("__MACOSX/", ".DS_Store", "Thumbs.db")
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError,
            NotImplementedError)  # fmt: skip


@dataclass(frozen=True)
class TableFile:
    """A table's file.

    Attributes:
        path: the file.
        suffix: of the table itself, such as ".csv" of "a.csv.gz"; lower case.
        packing: ".gz", ".bz2", ".xz", ".zip", or "".
        member: the table's name in the archive, or "".
    """

    path: Path
    suffix: str
    packing: str = ""
    member: str = ""

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The table's bytes.

        Raises:
            UnsupportedTableError: the file is damaged, or not packed as its name says.
        """
        try:
            if self.packing == ".zip":
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                    yield cast(BinaryIO, file)
            elif self.packing:
                with _OPENERS[self.packing](self.path, "rb") as file:
                    yield cast(BinaryIO, file)
            else:
                with self.path.open("rb") as file:
                    yield file
        except _DAMAGED as error:
            if not self.packing:
                raise
            raise _damaged(self.path, self.packing, error) from error

    def read(self) -> bytes:
        """All bytes of the table.

        Raises:
            UnsupportedTableError: the file is damaged.
            UnsafeFileError: it unpacks to far more than any table does.
        """
        if not self.packing:
            return self.path.read_bytes()
        parts, size = [], 0
        with self.open() as file:
            while part := file.read(_CHUNK):
                size += len(part)
                check_unpacked(self.path, size)
                parts.append(part)
        return b"".join(parts)

    def write(self, parts: Iterator[bytes], path: Path) -> None:
        """Write `parts` into `path`, packed as this file is; an archive is left unpacked."""
        opener = _OPENERS.get(self.packing)
        with opener(path, "wb") if opener else path.open("wb") as file:
            for part in parts:
                file.write(part)


def table_file(path: Path) -> TableFile:
    """What `path` is by its name and, of an archive, by what lies in it.

    Raises:
        UnsupportedTableError: an archive that is damaged, or holds none or several files.
    """
    suffix = path.suffix.lower()
    if suffix in _OPENERS:
        return TableFile(path, Path(path.stem).suffix.lower(), suffix)
    if suffix != ".zip" or not path.is_file():
        return TableFile(path, suffix)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except _DAMAGED as error:
        raise _damaged(path, suffix, error) from error
    names = [
        one.filename
        for one in members
        if not one.is_dir() and not any(part in one.filename for part in _NO_TABLES)
    ]
    if len(names) != 1:
        listed = ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
        raise UnsupportedTableError(
            f"{path} holds {len(names)} files{f' ({listed})' if names else ''}, not one table: "
            "unpack it and name the table's file."
        )
    return TableFile(path, PurePosixPath(names[0]).suffix.lower(), suffix, names[0])


def check_unpacked(path: Path, size: int) -> None:
    """Refuse what unpacks to far more than any table does.

    Args:
        path: the packed file.
        size: bytes of what is in it.

    Raises:
        UnsafeFileError: it does.
    """
    packed = path.stat().st_size
    if size > max(_MOST_BYTES, _MOST_TIMES * packed):
        raise UnsafeFileError(
            f"{path} has {packed:,} bytes and unpacks to {size:,} or more: it is not read. Unpack "
            "it yourself if it is a table."
        )


def _damaged(path: Path, packing: str, error: Exception) -> UnsupportedTableError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UnsupportedTableError(f"{path} cannot be unpacked ({packing}): {reason}.")
