"""A field of an options dataclass."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with the text that `--help` shows for it."""
    return field(default=default, metadata={"help": help})
