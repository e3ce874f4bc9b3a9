"""Tasks from a Python file of the user's own, which is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from lora_fsdp.errors import BrokenTaskError, DataFileNotFoundError, LoraFsdpError


def import_task_file(path: str | Path | None) -> None:
    """Import the file, so that the tasks it registers are known; `None` = nothing.

    It runs with the user's rights, as any script does: name only files that you trust.

    Raises:
        DataFileNotFoundError: there is no such file.
        BrokenTaskError: it fails to import; the message gives the reason.
    """
    if path is None:
        return
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataFileNotFoundError(f"There is no task file {file.absolute()}: check --task_file.")
    name = f"lora_fsdp_task_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise BrokenTaskError(f"The task file {file} is no Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except LoraFsdpError:
        raise
    except Exception as error:  # the user's file may raise anything
        raise BrokenTaskError(
            f"The task file {file} fails to import: {type(error).__name__}: {error}."
        ) from error
