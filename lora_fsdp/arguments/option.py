"""A field of an options dataclass."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from lora_fsdp.errors import ArgumentError


def option(default: Any, help: str) -> Any:
    """A dataclass field with the text that `--help` shows for it."""
    return field(default=default, metadata={"help": help})


def check_is_text(name: str, value: object) -> None:
    """Refuse a path or another text that no file of a run could hold.

    Raises:
        ArgumentError: it holds bytes that are not UTF-8, which Python reads as half surrogates, or
            NUL; names the option.
    """
    try:
        whole = str(value).encode("utf-8")
    except UnicodeEncodeError:
        raise ArgumentError(
            f"--{name} {str(value)!r} is not UTF-8: rename the file or folder, or give another."
        ) from None
    if b"\0" in whole:
        raise ArgumentError(f"--{name} {str(value)!r} holds a NUL character: give another.")
