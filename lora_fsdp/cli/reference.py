"""Writes docs/commands.md from the commands' own help: `python -m lora_fsdp.cli.reference`."""

from __future__ import annotations

import argparse
import io
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path

from lora_fsdp.cli.main import MODULES, commands_of, main

_WIDTH = "90"
_HEAD = """\
# Commands

Written by `python -m lora_fsdp.cli.reference` from the commands' own help; a test compares them.
The path from a table to answers is in the [quickstart](quickstart.md#the-command-line).

Every option can stand in a YAML file (`--config`), without its dashes; the command line wins. With
`--json`, stdout is one JSON document and nothing else. Progress and errors go to stderr.

"""


def reference_page() -> str:
    """The page's text."""
    os.environ["COLUMNS"] = _WIDTH  # argparse's width
    parts = [_HEAD, "```text\n", _help([]), "```\n"]
    for command in (c for module in MODULES for c in commands_of(module).values()):
        parts += [f"\n## {command.name}\n\n```text\n", _help(command.name.split()), "```\n"]
    return "".join(parts)


def _help(words: list[str]) -> str:
    output = io.StringIO()
    with redirect_stdout(output), suppress(SystemExit):  # how argparse ends after its help
        main([*words, "--help"])
    return output.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="where the page goes")
    parser.parse_args().file.write_text(reference_page(), encoding="utf-8")
