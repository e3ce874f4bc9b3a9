"""Reading files of a folder that anyone may have written: nothing outside it, and no pickles.

An adapter or a model is a folder that people pass on. What it says about itself (file names, links,
JSON) is input like any other.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_fsdp.errors import AdapterVerificationError, UnsafeFileError

#: Far above any real configuration, far below what would hurt to parse.
LARGEST_JSON_BYTES = 64 * 1024 * 1024


def contained_file(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, if it really lies there.

    Links may point within the folder or, in a snapshot of the Hub's cache, within that model's part
    of the cache (which is how the cache is laid out).

    Raises:
        UnsafeFileError: `name` is no plain file name, or a link that leads elsewhere.
    """
    if not name or name in (".", "..") or "\0" in name or Path(name).name != name or "\\" in name:
        raise UnsafeFileError(
            f"{folder} names the file {name!r}, which is no plain file name: it is not opened."
        )
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = (root / name).resolve()
    except (OSError, RuntimeError) as error:
        raise UnsafeFileError(f"{folder / name} is a link that leads to itself.") from error
    if not any(target.is_relative_to(place) for place in allowed):
        raise UnsafeFileError(
            f"{folder / name} is a link that leads out of its folder, to {target}: it is not "
            "opened. Copy the file there if you trust it."
        )
    return root / name


def read_json_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of `folder`.

    Raises:
        AdapterVerificationError: it is missing, too large, damaged or no object.
        UnsafeFileError: it does not lie in the folder.
    """
    file = contained_file(folder, name)
    if not file.is_file():
        raise AdapterVerificationError(f"{folder} holds no {name}.")
    if file.stat().st_size > LARGEST_JSON_BYTES:
        raise AdapterVerificationError(f"{file} is larger than any real {name}: it is not read.")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # malformed, not Unicode, nested too deeply
        raise AdapterVerificationError(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise AdapterVerificationError(f"{file} is damaged: it must hold a JSON object.")
    return value


def files_by_tensor(folder: Path, index: str) -> dict[str, str]:
    """What an index of weights says: for each tensor the file of `folder` that holds it.

    Raises:
        AdapterVerificationError: the index is damaged, or says nothing.
        UnsafeFileError: it names something that does not lie in the folder.
    """
    listed = read_json_object(folder, index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise AdapterVerificationError(f"{folder / index} is damaged: weight_map is missing.")
    for name in sorted(set(map(str, listed.values()))):
        contained_file(folder, name)
    return {tensor: str(name) for tensor, name in listed.items()}


def check_weight_indices(folder: Path) -> None:
    """Refuse a model folder of which an index names a weight file that does not lie in it.

    For what transformers opens by those names without looking where they lead.

    Raises:
        AdapterVerificationError, UnsafeFileError: see `files_by_tensor`.
    """
    for index in sorted(folder.glob("*.index.json")):
        files_by_tensor(folder, index.name)


def open_safetensors(folder: Path, name: str) -> Any:
    """A safetensors file of `folder`, its tensors mapped and not read; to be used in a `with`.

    Raises:
        AdapterVerificationError: it is missing or damaged.
        UnsafeFileError: it does not lie in the folder.
    """
    file = contained_file(folder, name)
    if not file.is_file():
        raise AdapterVerificationError(f"{folder} holds no {name}.")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterVerificationError(f"{file} is damaged: {error}") from error


def sha256_of_file(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
