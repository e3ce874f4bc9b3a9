"""Whether the hosts of a run have the same: before anything is read, and named where not.

One small record a host, gathered from every rank. A host that lacks a file would otherwise end
alone, and the others would wait for it until a collective times out; one that has another version
of the model or of a library would train something else.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_fsdp.distributed.launch import launch_fingerprint
from lora_fsdp.errors import RankMismatchError
from lora_fsdp.ranks import from_every_rank, host_count

#: Clocks further apart than this confuse logs, certificates and what is newer than what.
CLOCK_SECONDS = 30.0
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "lora-fsdp")
_MISSING = "missing"
_WHOLE_UP_TO = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 16, 2**16


@dataclass(frozen=True)
class HostRecord:
    """What a host has.

    Attributes:
        name: its own.
        files: of each file or folder that the run reads, by the option that names it: what it is
            recognised by, or that it is missing.
        versions: of Python and packages.
        yaml: the launcher's FSDP settings.
        clock: seconds since 1970, taken when every rank was there.
    """

    name: str
    files: Mapping[str, str]
    versions: Mapping[str, str]
    yaml: str
    clock: float


def compare_hosts(paths: Mapping[str, str | None]) -> None:
    """Compare what the run's hosts have; a collective call, and nothing where there is one host.

    Args:
        paths: files and folders that the run reads, by the option that names them; a name that is
            no path on any host (one on the Hub) is left out.

    Raises:
        RankMismatchError: on every rank; names the host, what it has otherwise, and what to do.
    """
    if host_count() == 1:
        return
    mine = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        mine = {name: recognise(Path(path).expanduser()) for name, path in paths.items() if path}
    from_every_rank(None)  # from here on every rank is there: clocks are read at one time
    record = None
    if mine is not None:
        record = HostRecord(
            socket.gethostname(), mine, _versions(), launch_fingerprint(), time.time()
        )
    records = [one for one in from_every_rank(record) if one is not None]
    if found := differences(records, paths=paths):
        raise RankMismatchError(" ".join(found))


def differences(records: Sequence[HostRecord], *, paths: Mapping[str, str | None]) -> list[str]:
    """A sentence for each host and thing that is otherwise than on most hosts, or on the first."""
    sentences = []
    for option in records[0].files:
        values = [one.files[option] for one in records]
        if set(values) == {_MISSING}:
            continue  # a name on the Hub; or what is missing everywhere is said where it is read
        what = f"--{option} {paths[option]}"
        for name, value, usual in _odd(records, [v if v != _MISSING else None for v in values]):
            if value is None:
                sentences.append(f"{name} has no {what}: copy it there from {usual}.")
            else:
                sentences.append(
                    f"{name} has another {what} than {usual} (SHA-256 {value[:12]}): copy the "
                    "right one to every host."
                )
    for package in records[0].versions:
        for name, value, usual in _odd(records, [one.versions.get(package) for one in records]):
            right = next(one.versions.get(package) for one in records if one.name == usual)
            sentences.append(
                f"{name} has {package} {value or 'not installed'}, {usual} has {right}: install "
                "the same on every host."
            )
    for name, _, usual in _odd(records, [one.yaml for one in records]):
        sentences.append(
            f"{name} was started with other settings of the accelerate YAML than {usual}: give "
            "every host the same YAML."
        )
    clocks = sorted(one.clock for one in records)
    middle = clocks[(len(clocks) - 1) // 2]
    for one in records:
        if abs(one.clock - middle) > CLOCK_SECONDS:
            sentences.append(
                f"{one.name}'s clock is {one.clock - middle:+.0f} s off: set it (chronyc makestep)."
            )
    return sentences


def recognise(path: Path) -> str:
    """What a file or folder is recognised by: SHA-256 of names, sizes and contents.

    Of large files, samples from beginning to end are read: a whole 7B would take a minute.
    """
    digest = hashlib.sha256()
    if path.is_file():
        _add(digest, path)
    elif path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                digest.update(file.name.encode())
                _add(digest, file)
    else:
        return _MISSING
    return digest.hexdigest()


def _add(digest: hashlib._Hash, file: Path) -> None:
    try:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            if size <= _WHOLE_UP_TO:
                digest.update(opened.read())
                return
            for place in range(_SAMPLES):
                opened.seek(place * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    except OSError as error:
        digest.update(f"cannot be read: {error.strerror}".encode())


def _odd(
    records: Sequence[HostRecord], values: Sequence[str | None]
) -> list[tuple[str, str | None, str]]:
    """Hosts whose value is not the usual one: name, value, and a host that has the usual one.

    What is missing is never usual; of values as frequent as one another, the first is.
    """
    there = [value for value in values if value is not None]
    if not there or len(set(values)) == 1:
        return []
    usual = Counter(there).most_common(1)[0][0]
    model = records[values.index(usual)].name
    return [
        (record.name, value, model)
        for record, value in zip(records, values, strict=True)
        if value != usual
    ]


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
