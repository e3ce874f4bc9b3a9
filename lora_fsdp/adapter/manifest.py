"""`manifest.json` beside an adapter: the size and SHA-256 that every file had when it was saved."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from lora_fsdp.base.folders import contained_file, read_json_object, sha256_of_file
from lora_fsdp.errors import AdapterVerificationError, UnsafeFileError

MANIFEST_FILE = "manifest.json"


def changed_files(folder: Path) -> dict[str, str] | None:
    """What became of each file that is not as it was saved, by its name.

    Returns:
        empty if all are as they were; `None` if the folder has no manifest.

    Raises:
        AdapterVerificationError: the manifest is damaged; the message says how.
        UnsafeFileError: the manifest does not lie in the folder.
    """
    file = folder / MANIFEST_FILE
    if not file.exists() and not file.is_symlink():
        return None
    listed = read_json_object(folder, MANIFEST_FILE).get("files")
    if not isinstance(listed, dict) or not listed:
        raise AdapterVerificationError(f"{file} is damaged: it must list files.")
    for name, expected in listed.items():
        if not _is_entry(expected):
            raise AdapterVerificationError(
                f"{file} is damaged: {name[:80]!r} must have a size (bytes) and a SHA-256."
            )
    found = {name[:200]: _change(folder, name, expected) for name, expected in listed.items()}
    return {name: change for name, change in found.items() if change}


def _is_entry(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("bytes"), int)
        and isinstance(value.get("sha256"), str)
    )


def _change(folder: Path, name: str, expected: dict[str, Any]) -> str:
    """What became of a file; empty if it is as it was saved."""
    *inner, last = PurePosixPath(name).parts or ("",)
    if ".." in inner or PurePosixPath(name).is_absolute() or (folder.joinpath(*inner)).is_symlink():
        return "lies outside the folder"
    try:
        file = contained_file(folder.joinpath(*inner), last)
    except (UnsafeFileError, UnicodeError):
        return "is no plain file of the folder"
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != expected["bytes"] or sha256_of_file(file) != expected["sha256"]:
        return "was changed after it was saved"
    return ""
