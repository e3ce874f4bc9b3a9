"""`lora-fsdp`: finds the subcommand, runs it, and turns errors into one sentence and a code."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence

from lora_fsdp import __version__
from lora_fsdp.cli.command import Command
from lora_fsdp.errors import ArgumentError, DownloadError, LoraFsdpError, did_you_mean
from lora_fsdp.failures import INTERRUPTED, NOT_REACHED, WRONG_INPUT
from lora_fsdp.printing import ignore_known_warnings, say

# In the order in which one needs them. A command's module is imported when it is called.
MODULES = (
    "demo",
    "init",
    "download",
    "tasks",
    "plan",
    "doctor",
    "train",
    "sweep",
    "evaluate",
    "predict",
    "serve",
    "next",
    "compare",
    "report",
    "verify",
    "merge",
    "completion",
)

_HELP = """\
usage: lora-fsdp COMMAND [options]

Fine-tune a causal language model: from a table to answers.

commands:
{commands}

`lora-fsdp COMMAND --help` shows its options and examples.
Options may stand in a YAML file given with --config;
the command line wins.

from a table of your own to answers:
  lora-fsdp tasks check tweets.csv --task sentiment
  lora-fsdp train --task sentiment \\
      --data_file tweets.csv \\
      --model_name_or_path MODEL --output_dir runs/mine
  lora-fsdp predict new.csv --adapter runs/mine \\
      --output answers.csv

exit codes:
  0    done
  1    crashed: a bug, or a process of the run was killed
  2    wrong input; the message says what to change
  3    verify: a check failed
  4    a server was not reached, or the connection broke off
  5    doctor: there are errors
  70   train: a process made no progress (--stall_seconds)
  75   train: stopped on request, with a checkpoint
  130  interrupted with Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = "lora-fsdp"
    ignore_known_warnings()
    atexit.register(gc.freeze)  # an ending process need not look through what it imported
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            say(_HELP.format(commands=_summaries()).rstrip("\n"))
            return 0
        if words[0] == "--version":
            say(__version__)
            return 0
        found, rest = find_command(words)
        command = f"lora-fsdp {found.name}"
        return found(rest)
    except LoraFsdpError as error:
        say(f"{command}: {error}", file=sys.stderr)
        return NOT_REACHED if isinstance(error, DownloadError) else WRONG_INPUT
    except KeyboardInterrupt:
        say(f"{command}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left (`| head`); Python would complain again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def commands_of(module: str) -> Mapping[str, Command]:
    """The commands of a module, by their name's last word."""
    commands: Sequence[Command] = importlib.import_module(f"lora_fsdp.cli.{module}").COMMANDS
    return {command.name.split()[-1]: command for command in commands}


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that `words` begin with, and the words after it.

    Raises:
        ArgumentError: there is no such command; the message suggests the nearest.
    """
    module = _known(words[0], MODULES, "command")
    commands = commands_of(module)
    if module in commands:
        return commands[module], list(words[1:])
    rest = list(words[1:])
    if not rest or rest[0] in ("-h", "--help"):
        lines = [f"  {command.name:<14} {command.summary}" for command in commands.values()]
        say(f"usage: lora-fsdp {module} {{{','.join(commands)}}} ...\n\n" + "\n".join(lines))
        raise SystemExit(0)
    return commands[_known(rest[0], list(commands), f"{module} command")], rest[1:]


def _known(word: str, known: Sequence[str], what: str) -> str:
    if word in known:
        return word
    hint = did_you_mean(word, known)
    raise ArgumentError(f"There is no {what} {word!r}.{hint} Known: {', '.join(known)}.")


def _summaries() -> str:
    commands = [command for module in MODULES for command in commands_of(module).values()]
    width = shutil.get_terminal_size().columns - 1
    return "\n".join(
        textwrap.fill(
            command.summary,
            width=width,
            initial_indent=f"  {command.name:<13}",
            subsequent_indent=" " * 15,
        )
        for command in commands
    )


if __name__ == "__main__":
    raise SystemExit(main())
