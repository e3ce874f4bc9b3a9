"""What `--data_file` names: a file, several, a pattern, a folder, or a dataset on the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_fsdp.data.formats.compressed import table_file
from lora_fsdp.data.formats.records import not_found
from lora_fsdp.errors import ArgumentError, DownloadError, UnsupportedTableError

# owner/name, perhaps with a configuration and a split: owner/name:config:split
_HUB_NAME = re.compile(
    r"(?:hf://datasets/)?([\w][\w.-]*/[\w][\w.-]*)(?::([\w.-]*))?(?::([\w.-]+))?"
)
# What `datasets` writes into a folder of save_to_disk.
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_TRAIN = re.compile(r"(^|[-_/.])train(ing)?([-_./0-9]|$)", re.IGNORECASE)
_OTHER_SPLIT = re.compile(
    r"(^|[-_/.])(test(ing)?|eval(uation)?|valid(ation)?|val|dev)([-_./0-9]|$)", re.IGNORECASE
)


def table_paths(name: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """The files, in order, that a name stands for; one that `save_to_disk` wrote is a folder.

    Args:
        name: a path, a pattern (`data/*.csv`), several paths with `os.pathsep` between them, or a
            folder of tables: all of them, or those of the split "train" where names say splits.
        suffixes: of tables.

    Raises:
        DataFileNotFoundError: there is none.
        UnsupportedTableError: a folder without a table, or with tables of several formats.
    """
    path = Path(name)
    if path.is_dir():
        if any((path / file).is_file() for file in _SAVED):
            return [path]
        return _of_folder(path, suffixes)
    if path.exists():
        return [path]
    parts = [part for part in str(name).split(os.pathsep) if part]
    if len(parts) > 1:
        return [one for part in parts for one in table_paths(part, suffixes)]
    if glob.has_magic(str(name)):
        found = sorted(Path(one) for one in glob.glob(str(name), recursive=True))
        if not found:
            raise not_found(path)
        return found
    raise not_found(path)


def input_paths(name: str) -> list[Path]:
    """The files and folders that are there of what `--data_file` names; nothing is refused."""
    if os.path.exists(name):
        return [Path(name)]
    parts = [part for part in name.split(os.pathsep) if part]
    return [Path(one) for part in parts for one in glob.glob(part, recursive=True)]


def _of_folder(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    tables = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        and _is_table(file, suffixes)
    ]
    names = {file: file.relative_to(folder).as_posix() for file in tables}
    train = [file for file in tables if _TRAIN.search(names[file])]
    if train:
        tables = train
    elif any(_OTHER_SPLIT.search(name) for name in names.values()):
        raise UnsupportedTableError(
            f"{folder} holds {_some(list(names.values()))} and nothing called train: name the file."
        )
    if not tables:
        raise UnsupportedTableError(
            f"{folder} holds no table ({', '.join(suffixes)}) and was not written by datasets' "
            "save_to_disk."
        )
    if len({table_file(file).suffix for file in tables}) > 1:
        raise UnsupportedTableError(
            f"{folder} holds tables of several formats ({_some([names[t] for t in tables])}): name "
            "the file."
        )
    return tables


def _is_table(file: Path, suffixes: Sequence[str]) -> bool:
    name = file.name.lower()
    packed = ("", ".gz", ".bz2", ".xz")
    return any(name.endswith(suffix + ending) for suffix in suffixes for ending in packed)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", …" if len(names) > 4 else "")


def hub_name(name: str | Path, suffixes: Sequence[str]) -> re.Match[str] | None:
    """The match of a dataset's name on the Hub, if `name` can be no path."""
    text = str(name)
    match = _HUB_NAME.fullmatch(text)
    if match is None or Path(text).exists():
        return None
    if text.startswith("hf://"):
        return match
    is_path = Path(text).parts[0] in (".", "..") or Path(text).parent.exists()
    return None if is_path or _is_table(Path(text), suffixes) else match


def load_from_hub(match: re.Match[str]) -> Any:
    """The rows of a dataset on the Hub (a `datasets.Dataset`), of its split "train" by default.

    Raises:
        DownloadError: the Hub was not reached, or has no such dataset.
        ArgumentError: it has several configurations, or not the split.
    """
    import datasets

    name, config, split = match[1], match[2] or None, match[3] or "train"
    try:
        return datasets.load_dataset(name, config, split=split)
    except ValueError as error:  # a configuration or a split that is not there
        raise ArgumentError(
            f"The dataset {name} on the Hub: {_first_line(error)} Name it as "
            f"{name}:CONFIGURATION:SPLIT."
        ) from error
    except Exception as error:  # whatever the network, the Hub and the dataset's files raise
        raise DownloadError(
            f"{name!r} is no file here, and as a dataset on the Hub it could not be loaded: "
            f"{_first_line(error)} Check the name and the connection, or download its files and "
            "name them."
        ) from error


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return text if text.endswith(".") else f"{text}."
