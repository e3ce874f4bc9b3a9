"""`--grid` as it is written: settings with their values, each typed as its option is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.errors import ArgumentError, did_you_mean
from lora_fsdp.options import OptionParser

#: Settings of the training that may differ between the adapters of a sweep.
OF_TRAINING = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "seed", "data_seed",
)  # fmt: skip
OF_ADAPTER = tuple(one.name for one in fields(LoraArguments) if one.name != "adapter_name_or_path")
KEYS = (*OF_TRAINING, *OF_ADAPTER)
_OF_THE_ROWS = ("task", "data_file", "task_file", "model_name_or_path")
_OF_ALL = frozenset(
    one.name
    for owner in (FineTuningArguments, LoraArguments, DataArguments, ModelArguments)
    for one in fields(owner)
)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, of which a search draws; whole ones if both are."""

    low: float
    high: float


def read_grid(given: Sequence[str]) -> list[dict[str, list[Any]]]:
    """`--grid` as a list of mappings from a setting to its values, not yet checked.

    Args:
        given: `name=value,value` for each setting; or one JSON object, which a recipe's mapping
            becomes; or the path of a YAML file with a mapping or a list of them.

    Raises:
        ArgumentError: it has none of these forms.
    """
    if len(given) == 1 and Path(given[0]).suffix.lower() in (".yaml", ".yml"):
        return _grid_of(_read_yaml(Path(given[0])), source=given[0])
    if len(given) == 1 and given[0].lstrip().startswith(("{", "[")):
        try:
            return _grid_of(json.loads(given[0]), source="--grid")
        except json.JSONDecodeError as error:
            raise ArgumentError(f"--grid is not valid JSON ({error}): {given[0][:80]!r}") from error
    grid: dict[str, list[Any]] = {}
    for part in given:
        name, equals, values = part.partition("=")
        if not equals or not values:
            raise ArgumentError(
                f"--grid {part[:80]!r}: give name=value,value for each setting, for example "
                "--grid learning_rate=1e-4,3e-4 lora_r=8,32, or a YAML file."
            )
        if name in grid:
            raise ArgumentError(f"--grid names {name} twice: give all its values at once.")
        # Names in a list of one value are joined by +.
        grid[name.lstrip("-")] = [one.split("+") if "+" in one else one for one in _split(values)]
    return [grid]


def _split(values: str) -> list[str]:
    """At commas outside of JSON's brackets."""
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _read_yaml(file: Path) -> Any:
    if not file.is_file():
        raise ArgumentError(f"There is no file {file.absolute()}: check --grid.")
    try:
        return yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArgumentError(f"--grid {file} is no valid YAML: {reason}") from error


def _grid_of(contents: Any, *, source: str) -> list[dict[str, list[Any]]]:
    grids = contents if isinstance(contents, list) else [contents]
    if (
        not grids
        or not all(isinstance(one, dict) and one for one in grids)
        or any(value == [] for one in grids for value in one.values())
    ):
        raise ArgumentError(
            f"{source} must hold settings, each with its values (learning_rate: [1e-4, 3e-4]), or "
            "a list of such."
        )
    return [
        {str(name): value if isinstance(value, list) else [value] for name, value in one.items()}
        for one in grids
    ]


def checked_grid(grids: Sequence[Mapping[str, Sequence[Any]]]) -> list[dict[str, list[Any]]]:
    """The grid with values as the options have them, and ranges as `Range`.

    Raises:
        ArgumentError: an unknown setting (the message suggests the nearest), or a value of the
            wrong kind.
    """
    return [
        {name: [_value(name, value) for value in values] for name, values in one.items()}
        for one in grids
    ]


def _value(name: str, value: Any) -> Any:
    """A value, or a range of values."""
    ends = value.split("..") if isinstance(value, str) else []
    if len(ends) != 2:
        return _typed(name, value)
    low, high = (_typed(name, end) for end in ends)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not low < high:
        raise ArgumentError(
            f"--grid {name}={value}: a range goes from a number to a larger one, as in "
            "learning_rate=1e-4..1e-2."
        )
    return Range(low, high)


def _typed(name: str, value: Any) -> Any:
    """A value as the option's own parser reads it."""
    if name not in KEYS:
        if name in _OF_THE_ROWS:
            raise ArgumentError(
                f"--grid {name}: the adapters of a sweep learn one task from one table; start a "
                f"sweep for each {name} (--{name}), with an --output_dir of its own."
            )
        if name in _OF_ALL:
            raise ArgumentError(
                f"--grid {name}: it cannot differ between the adapters of a sweep; set --{name} "
                f"once for all. These can: {', '.join(KEYS)}."
            )
        raise ArgumentError(
            f"--grid {name[:80]}: there is no such setting.{did_you_mean(name, KEYS)} These can "
            f"differ: {', '.join(KEYS)}."
        )
    is_list = isinstance(value, list)
    given = json.dumps(value) if isinstance(value, dict) else value
    texts = [str(one) for one in given] if is_list else [str(given)]
    owner = LoraArguments if name in OF_ADAPTER else FineTuningArguments
    try:
        [values] = OptionParser((owner,)).parse_values([f"--{name}", *texts])
    except ArgumentError as error:
        # Upstream's parser takes every option with dashes for underscores as well.
        reason = str(error).removesuffix(" See --help.").partition(": ")[2]
        raise ArgumentError(f"--grid {name}={'+'.join(texts)}: {reason}") from error
    typed = values[name]
    return json.loads(typed) if name == "lora_kwargs" and isinstance(typed, str) else typed
