"""Options and recipes, read into dataclasses; what is wrong with them in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, NoReturn

from trl import TrlParser  # type: ignore[attr-defined]

from lora_fsdp.arguments.option import check_is_text
from lora_fsdp.arguments.peers import about_unknown
from lora_fsdp.errors import ArgumentError, LoraFsdpError
from lora_fsdp.recipes import read_recipe


class OptionParser(TrlParser):
    """`trl.TrlParser` for the scripts and the command line.

    Options are written out in full, and every mistake is one `ArgumentError`.

    Args:
        classes: dataclasses whose fields are the options.
        prog: the command's name in its help.
        description: what the command does, in the help above the options.
        epilog: examples, in the help below them.
    """

    def __init__(
        self,
        classes: Sequence[type],
        *,
        prog: str | None = None,
        description: str | None = None,
        epilog: str | None = None,
    ) -> None:
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
        given = _separate_config(arguments)
        if "--config" in given:
            place = given.index("--config")
            if place == len(given) - 1:
                raise ArgumentError("--config needs the path of a recipe (a YAML file).")
            known = self.option_names()
            recipe = read_recipe(given[place + 1], options=known, others_allowed=shares_recipe)
            # Before the command line's own, which come later and so win.
            given = recipe + given[:place] + given[place + 2 :]
        return given

    def option_names(self) -> list[str]:
        """All options, without their dashes."""
        classes: Iterable[Any] = self.dataclass_types
        return [field.name for cls in classes for field in fields(cls)] + ["config"]


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
