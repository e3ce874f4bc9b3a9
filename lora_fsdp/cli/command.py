"""A subcommand: its options, its help, and the function that carries it out."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_fsdp.errors import ArgumentError
from lora_fsdp.options import OptionParser
from lora_fsdp.printing import say, visible_json


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name: its words after `lora-fsdp`.
        summary: what it does, one sentence.
        examples: command lines to learn from; `lora-fsdp` is put before each.
        options: dataclasses whose fields are its options.
        run: gets one object of each class and returns the exit code.
        positional: the option that may be given without its name, anywhere.
        shares_recipe: its `--config` may be a recipe of `train`, whose other keys do not concern
            it.
    """

    name: str
    summary: str
    examples: Sequence[str]
    options: Sequence[type]
    run: Callable[..., int]
    positional: str | None = None
    shares_recipe: bool = False

    def parser(self) -> OptionParser:
        """The parser of this command's options."""
        shown = "\n".join(f"  lora-fsdp {example}" for example in self.examples)
        first = f" [{self.positional.upper()}]" if self.positional else ""
        parser = OptionParser(
            self.options,
            prog=f"lora-fsdp {self.name}",
            description=textwrap.fill(self.summary, shutil.get_terminal_size().columns - 2),
            epilog=f"examples:\n{shown}",
            positional=self.positional,
        )
        parser.usage = f"lora-fsdp {self.name}{first} [options]"
        return parser

    def __call__(self, arguments: Sequence[str]) -> int:
        """Parse `arguments` and run."""
        parsed = self.parser().parse(list(arguments), shares_recipe=self.shares_recipe)
        return self.run(*parsed)


def required(value: str | None, option: str, what: str) -> str:
    """`value`, or the sentence that it is missing."""
    if not value:
        raise ArgumentError(f"{option} is missing: name {what}.")
    return value


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    say(visible_json(json.dumps(value, indent=2, ensure_ascii=False)))
