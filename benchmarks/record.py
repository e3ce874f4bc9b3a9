"""A measurement kept as a file: its figures with the command, the day, the machine and versions.

The pages' figures are held to these files (tests/test_figures.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OPTION = "--write"


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--write FILE`, for a command whose figures a page may show."""
    parser.add_argument(OPTION, type=Path, metavar="FILE", help="keep the figures as JSON there")


def keep(file: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures of the running command, if it was asked to."""
    if file is None:
        return
    from benchmarks.throughput import environment  # with torch, which not every command needs

    record = {
        "command": command(sys.modules["__main__"].__spec__.name, sys.argv[1:]),  # type: ignore[union-attr]
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "environment": environment(),
    }
    file.write_text(json.dumps({**record, **figures}, indent=1) + "\n", encoding="utf-8")


def command(module: str, words: Sequence[str]) -> str:
    """How it was called, without `--write FILE`."""
    place = words.index(OPTION) if OPTION in words else len(words)
    return shlex.join(["python", "-m", module, *words[:place], *words[place + 2 :]])
