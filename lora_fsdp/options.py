"""Options and recipes, read into dataclasses; what is wrong with them in one sentence."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_fsdp.arguments.option import check_is_text
from lora_fsdp.arguments.peers import about_unknown
from lora_fsdp.errors import ArgumentError, LoraFsdpError
from lora_fsdp.recipes import read_recipe


def _parser_of_trl() -> type:
    """TRL's copy of transformers' parser, which imports neither of them.

    The package around it reads the files of every installed distribution when it is imported, a
    tenth of what a launch imports; it is left out where the copy can be had without.
    """
    found = importlib.util.find_spec("trl")
    file = Path(found.origin or "").parent / "scripts" / "_hf_argparser.py" if found else None
    if file is None or not file.is_file():
        from trl import TrlParser  # type: ignore[attr-defined]

        return TrlParser
    spec = importlib.util.spec_from_file_location("lora_fsdp._parser_of_trl", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser: type = module.HfArgumentParser
    return parser


if TYPE_CHECKING:
    from trl import TrlParser as _Parser  # type: ignore[attr-defined]
else:
    _Parser = _parser_of_trl()


class OptionParser(_Parser):
    """`transformers.HfArgumentParser`, as TRL has it, for the scripts and the command line.

    Options are written out in full, and every mistake is one `ArgumentError`.

    Args:
        classes: dataclasses whose fields are the options.
        prog: the command's name in its help.
        description: what the command does, in the help above the options.
        epilog: examples, in the help below them.
        positional: the option whose value may stand without its name, anywhere.
    """

    def __init__(
        self,
        classes: Sequence[type],
        *,
        prog: str | None = None,
        description: str | None = None,
        epilog: str | None = None,
        positional: str | None = None,
    ) -> None:
        self.positional = positional
        # Several files are one table.
        self.positional_is_file = positional == "data_file"
        super().__init__(
            list(classes),  # type: ignore[arg-type]
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def format_help(self) -> str:
        """The help, with the option that upstream takes out before argparse sees it."""
        if "--config" not in self._option_string_actions:
            self.add_argument("--config", help="YAML file with options; the command line wins.")
        return str(super().format_help())

    def error(self, message: str) -> NoReturn:
        """What argparse would print with the whole usage before it."""
        text = message[:500]
        raise ArgumentError(f"{text[:1].upper()}{text[1:]}. See --help.")

    def parse(self, arguments: Sequence[str], *, shares_recipe: bool = False) -> list[Any]:
        """One object of each class, from the command line and its `--config`.

        Args:
            arguments: the command line.
            shares_recipe: pass over recipe keys that are none of these options.

        Raises:
            ArgumentError: an unknown option or recipe key (the message suggests the nearest), a
                value of the wrong kind, or a recipe that cannot be read.
        """
        given = self._with_recipe(arguments, shares_recipe=shares_recipe)
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                given, return_remaining_strings=True
            )
        except LoraFsdpError:
            raise
        except (TypeError, ValueError) as error:  # TrainingArguments' own checks
            raise ArgumentError(str(error)) from error
        if unknown:
            raise ArgumentError(unknown_options(unknown, self.option_names()))
        return parsed

    def parse_values(self, arguments: Sequence[str]) -> list[dict[str, Any]]:
        """As `parse`, but for each class the values of its fields instead of an object.

        So what a class itself refuses (`FineTuningArguments` checks its values) can be looked at.

        Raises:
            ArgumentError: as `parse`, but for what the classes refuse.
        """
        given = self._with_recipe(arguments, shares_recipe=False)
        namespace, unknown = self.parse_known_args(given)
        if unknown:
            raise ArgumentError(unknown_options(unknown, self.option_names()))
        values = vars(namespace)
        classes: Iterable[Any] = self.dataclass_types
        return [
            {field.name: values[field.name] for field in fields(cls) if field.init}
            for cls in classes
        ]

    def _with_recipe(self, arguments: Sequence[str], *, shares_recipe: bool) -> list[str]:
        """The arguments with those of their `--config` written out."""
        for before, argument in pairwise(["", *arguments]):
            name, equals, value = argument.partition("=")
            if equals and name.startswith("--"):
                check_is_text(name.lstrip("-"), value)
            else:
                check_is_text(before.lstrip("-"), argument)
        given = self._with_names(_separate_config(arguments))
        if "--config" in given:
            place = given.index("--config")
            if place == len(given) - 1:
                raise ArgumentError("--config needs the path of a recipe (a YAML file).")
            known = self.option_names()
            recipe = read_recipe(given[place + 1], options=known, others_allowed=shares_recipe)
            # Before the command line's own, which come later and so win.
            given = self._with_names(recipe, is_recipe=True) + given[:place] + given[place + 2 :]
        return given

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it, but a switch takes no word that is no truth value for its own."""
        return super().parse_known_args(
            None if args is None else self._disentangled(args), namespace
        )

    # ---- values that stand without their option's name -------------------------------------------

    def _with_names(self, arguments: Sequence[str], *, is_recipe: bool = False) -> list[str]:
        """`arguments` with the name before each value that stands alone.

        Raises:
            ArgumentError: several stand alone where one is meant, or beside the option itself.
        """
        named, alone = self._sorted_out(arguments)
        if self.positional is None or not alone:
            return list(arguments)
        option = f"--{self.positional}"
        if any(word.partition("=")[0] == option for word in named):
            if not (is_recipe and self.positional_is_file):
                raise ArgumentError(
                    f"{' and '.join(map(repr, alone))} and {option} are both given: keep one."
                )
            alone = [_value_of(option, named), *alone]  # a list in a recipe
        action = self._option_string_actions[option]
        if action.nargs in ("+", "*"):
            return [*named, option, *alone]
        if self.positional_is_file:
            return [*named, f"{option}={os.pathsep.join(alone)}"]
        if len(alone) > 1:
            raise ArgumentError(
                f"{' and '.join(map(repr, alone))} stand without an option, and one value is "
                f"meant ({self.positional}). See --help."
            )
        return [*named, f"{option}={alone[0]}"]

    def _disentangled(self, arguments: Sequence[str]) -> list[str]:
        """Switches written out, and a file's name behind an option's list moved to the front."""
        found: list[str] = []
        files: list[str] = []
        words = list(arguments)
        while words:
            word = words.pop(0)
            found.append(word)
            action = self._option_string_actions.get(word)
            if action is None:
                continue
            taken = _values_of(action, words, files=True)
            if action.nargs == "?" and not taken:
                found[-1] = f"{word}=true"  # or argparse would take the next word for its value
            found += taken
            del words[: len(taken)]
            while action.nargs in ("+", "*") and words and not _is_option(words[0]):
                files.append(words.pop(0))
        return [*files, *found]

    def _sorted_out(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """Options with their values, and the values that stand alone.

        With an unknown option nothing stands alone: which words are its values nobody knows.
        """
        named: list[str] = []
        alone: list[str] = []
        words = list(arguments)
        while words:
            word = words.pop(0)
            if not _is_option(word):
                alone.append(word)
                continue
            name, equals, _ = word.partition("=")
            action = self._option_string_actions.get(name)
            if action is None and name != "--config":
                return [*arguments], []
            if equals or (action is not None and action.nargs == 0):
                named.append(word)
                continue
            taken = _values_of(action, words, files=self.positional_is_file)
            named += [word, *taken]
            del words[: len(taken)]
        return named, alone

    def option_names(self) -> list[str]:
        """All options, without their dashes."""
        classes: Iterable[Any] = self.dataclass_types
        return [field.name for cls in classes for field in fields(cls)] + ["config"]


#: What upstream takes for a truth value.
_TRUTH = {"true", "false", "yes", "no", "t", "f", "y", "n", "1", "0"}


_TABLE = re.compile(
    r"\.(csv|tsv|tab|psv|txt|xlsx|xlsm|json|jsonl|ndjson|parquet)(\.(gz|bz2|xz))?$|\.zip$",
    re.IGNORECASE,
)


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit() and word[1] != "."


def _values_of(action: argparse.Action | None, words: Sequence[str], *, files: bool) -> list[str]:
    """The words after an option that are its values."""
    nargs = None if action is None else action.nargs
    if nargs == "?":
        return [word for word in words[:1] if word.lower() in _TRUTH]
    if nargs not in ("+", "*"):
        return list(words[:1])
    values = list(itertools.takewhile(lambda word: not _is_option(word), words))
    # The file's name behind a list of labels: no label is called so.
    while files and len(values) > 1 and _is_file(values[-1]):
        values.pop()
    return values


def _is_file(word: str) -> bool:
    """Whether a word is a table's file, perhaps one that is missing."""
    return _TABLE.search(word) is not None or ("." in word and os.path.isfile(word))


def _value_of(option: str, arguments: Sequence[str]) -> str:
    for place, word in enumerate(arguments):
        if word == option:
            return arguments[place + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return ""


def unknown_options(unknown: Sequence[str], known: Sequence[str]) -> str:
    """The message for options that do not exist, with the names of those that do what they mean."""
    hints = []
    for option in [text.partition("=")[0] for text in unknown if text.startswith("--")]:
        about = about_unknown(option.lstrip("-"), known)
        hints.append(f"{option} ({about})" if about else option)
    return f"Unknown option or recipe key: {', '.join(hints) or ' '.join(unknown)}. See --help."


def _separate_config(arguments: Sequence[str]) -> list[str]:
    """`--config=recipe.yaml` as two arguments, which is how upstream finds it."""
    separate: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        separate += [name, value] if name == "--config" and equals else [argument]
    return separate


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Each option once (upstream also takes it with dashes for underscores), and its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[-1 if action.dest == "help" else 0]
        if action.nargs in (0, "?"):
            return name
        if action.nargs in ("+", "*"):
            return f"{name} {action.dest.upper()} ..."
        return f"{name} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        empty = action.default in (None, "", False, [], argparse.SUPPRESS)
        return text if empty or action.dest == "help" else f"{text} [%(default)s]"
