"""A mark in the output folder that a running job writes there, so that no second one does."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from lora_fsdp.errors import OutputFolderInUseError

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"


def refuse_folder_in_use(folder: Path) -> None:
    """Every rank asks this before rank 0 changes anything.

    A lock of this machine is stale when its process is gone (or when its number belongs to a
    process that started later); of another machine this cannot be known from here.

    Raises:
        OutputFolderInUseError: another job holds the folder; the message names it.
    """
    owner = _read(folder / LOCK_FILE)
    if owner is None or not _holds(owner):
        return
    file = folder / LOCK_FILE
    there = owner["host"] != socket.gethostname()
    advice = f" If it is not running there any more, remove {file}." if there else ""
    raise OutputFolderInUseError(
        f"{folder} is in use by process {owner['pid']} on {owner['host']} (since "
        f"{owner['since']}): choose another --output_dir, or wait for it to end.{advice}"
    )


def take_output_lock(folder: Path) -> None:
    """Write the lock of this process; it goes away when the process ends or releases it.

    Raises:
        OutputFolderInUseError: another job was faster.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    if file.exists():
        refuse_folder_in_use(folder)
        owner = _read(file)
        if owner is None or not _is_of_this_launch(owner):
            logger.warning("Removing %s, left behind by a job that did not end well.", file)
        file.unlink(missing_ok=True)
    try:
        with file.open("x", encoding="utf-8") as opened:
            json.dump(_this_process(), opened)
    except FileExistsError:
        refuse_folder_in_use(folder)
    atexit.register(release_output_lock, folder)


def release_output_lock(folder: Path) -> None:
    """Remove the lock if it is this process's."""
    file = folder / LOCK_FILE
    owner = _read(file)
    if owner is not None and owner["host"] == socket.gethostname() and owner["pid"] == os.getpid():
        file.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "launcher": os.getppid() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        "host": socket.gethostname(),
        "started": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _read(file: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return owner if isinstance(owner, dict) and {"pid", "host", "started"} <= set(owner) else None


def _is_of_this_launch(owner: dict[str, Any]) -> bool:
    """Ranks that are not joined each take themselves for the first; what is said about that later
    is clearer than that one's own folder is in use.
    """
    this = _this_process()
    same = owner["pid"] == this["pid"]
    siblings = this["launcher"] is not None and owner.get("launcher") == this["launcher"]
    return owner["host"] == this["host"] and (same or siblings)


def _holds(owner: dict[str, Any]) -> bool:
    """Whether the lock's process still runs, and is not this one."""
    if owner["host"] != socket.gethostname():
        return True
    if _is_of_this_launch(owner):
        return False
    try:
        started = psutil.Process(owner["pid"]).create_time()
    except psutil.NoSuchProcess:
        return False
    return abs(started - owner["started"]) < 1.0
