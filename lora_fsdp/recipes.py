"""Recipes: YAML files of options, read as if they stood on the command line."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from lora_fsdp.arguments.peers import about_unknown
from lora_fsdp.errors import ArgumentError, did_you_mean

#: Far above any real recipe. References make a small file a huge one, so they count in full.
_LARGEST_BYTES = 1_000_000
_MOST_VALUES = 10_000
# Options that name a file that lies with a recipe.
_FILES = ("data_file", "eval_file", "test_file", "task_file")


def shipped_folder() -> Path:
    """Where `accelerate_configs` and `examples` are.

    `setup.py` puts them into the package when it is built, and a checkout has them beside it.
    """
    package = Path(__file__).resolve().parent
    return package if (package / "accelerate_configs").is_dir() else package.parent


def find_recipe(name: str | Path) -> Path:
    """A recipe by its path, or a shipped one by its name (`rating`, or with its folder).

    Raises:
        ArgumentError: there is neither; the message names those that are shipped.
    """
    file = Path(name)
    if file.is_file():
        return file
    shipped = {path.stem: path for path in _shipped_recipes()}
    stem = file.name.removesuffix(".yaml")
    if stem in shipped and file.parent.as_posix() in (".", "examples/recipes"):
        return shipped[stem]
    hint = did_you_mean(stem, shipped) or f" Shipped are: {', '.join(shipped)}."
    raise ArgumentError(f"There is no recipe {file.absolute()}: check --config.{hint}")


def _shipped_recipes() -> list[Path]:
    return sorted((shipped_folder() / "examples" / "recipes").glob("*.yaml"))


def read_recipe(
    path: str | Path, *, options: Collection[str], others_allowed: bool = False
) -> list[str]:
    """The command-line arguments that a recipe stands for.

    They go through the same parser as those of the command line, which checks their types. A table
    or task file that is not in the working directory is looked for beside the recipe.

    Args:
        path: a YAML file with options as keys, without the dashes; or the name of a shipped one.
        options: the names that there are.
        others_allowed: pass over other keys, which are another command's.

    Raises:
        ArgumentError: it is missing, no YAML, no mapping, or has an unknown key; the message
            suggests the nearest.
    """
    file = find_recipe(path)
    if file.stat().st_size > _LARGEST_BYTES:
        raise ArgumentError(f"The recipe {file} is larger than 1 MB: it is no recipe.")
    contents = _parse(file)
    if not isinstance(contents, dict):
        raise ArgumentError(f"The recipe {file} must hold options, a line each (key: value).")
    _refuse_endless(contents, file)
    for key in contents:
        if key not in options and not others_allowed:
            about = about_unknown(str(key)[:80], options)
            named = f"{str(key)[:80]!r} ({about})" if about else repr(str(key)[:80])
            raise ArgumentError(f"Unknown option or recipe key: {named}. See --help.")
    return [
        part
        for key, value in contents.items()
        if key in options
        for part in as_arguments(key, _found(key, value, file), source=f"The recipe {file}")
    ]


def _found(key: str, value: Any, recipe: Path) -> Any:
    """A file's name as it is, or where the recipe is if only there is such a file.

    A shipped recipe names its table from the folder that both were shipped in.
    """
    if isinstance(value, list) and key in _FILES:
        return [_found(key, one, recipe) for one in value]
    if key not in _FILES or not isinstance(value, str) or Path(value).is_absolute():
        return value
    try:
        if Path(value).exists():
            return value
        folders = [recipe.parent]
        if recipe.resolve() in _shipped_recipes():
            folders.append(shipped_folder())
        return next((str(at / value) for at in folders if (at / value).exists()), value)
    except (OSError, ValueError):  # no name that a file can have
        return value


def _parse(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArgumentError(f"The recipe {file} is no valid YAML: {reason}") from error


def _refuse_endless(contents: object, file: Path) -> None:
    """Refuse what contains itself, or would be huge with all its references written out."""
    pending, seen = [contents], 0
    while pending:
        value = pending.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise ArgumentError(
                f"The recipe {file} has more values than any recipe: it is refused."
            )
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            pending += value


def as_arguments(key: str, value: object, *, source: str) -> list[str]:
    """An option as it stands on the command line; nothing for `None`.

    Args:
        key: the option, without the dashes.
        value: a text, a number, a path, a truth value, a list of them, or a mapping,
            which becomes JSON.
        source: what holds the option, as the beginning of a message.

    Raises:
        ArgumentError: the value has no such form.
    """
    if value is None:  # as if it were not there
        return []
    if isinstance(value, dict):
        try:
            return [f"--{key}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{source}: {key} has no JSON form: {error}") from error
    if isinstance(value, list):
        if nested := [item for item in value if isinstance(item, dict | list | set | bytes)]:
            raise ArgumentError(
                f"{source}: {key} must be a plain list, without {str(nested[0])[:80]!r}."
            )
        return [f"--{key}", *map(str, value)]
    if isinstance(value, str | bool | int | float | Path):
        return [f"--{key}={value}"]
    raise ArgumentError(
        f"{source}: {key} must be a text, a number, true or false, or a list of them, not "
        f"a {type(value).__name__}; put it in quotes."
    )
