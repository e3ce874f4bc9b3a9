"""Which adapters a run of several has: a grid of settings, seeds, folds."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from lora_fsdp.arguments import FineTuningArguments, LoraArguments
from lora_fsdp.errors import ArgumentError, did_you_mean
from lora_fsdp.options import OptionParser

#: Settings of the training that may differ between the adapters of a sweep.
_TRAINING = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "seed", "data_seed",
)  # fmt: skip
_ADAPTER = tuple(one.name for one in fields(LoraArguments))
KEYS = (*_TRAINING, *_ADAPTER)
#: More is a mistake, not a sweep.
_MOST_SETTINGS = 1000


@dataclass(frozen=True)
class Asked:
    """One adapter that is asked for.

    Attributes:
        name: of its folder.
        setting: number of its setting, from 0; adapters that differ in their seed alone share it.
        values: what the grid sets, typed.
        seed: of its first values and of its order of examples.
        fold: the fold that it holds out, from 0; `None` = the rows held out for all.
    """

    name: str
    setting: int
    values: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    fold: int | None = None

    def arguments(self, training: FineTuningArguments, root: Path) -> FineTuningArguments:
        """Its run's own."""
        own = copy.copy(training)
        alone = {"seeds": 1, "folds": None, "grid": None, "samples": None}
        given = {name: value for name, value in self.values.items() if name in _TRAINING}
        for name, value in {**alone, **given, "seed": self.seed}.items():
            setattr(own, name, value)
        own.output_dir = str(root / self.name)
        own.resume_from_checkpoint = None
        return own

    def adapter(self, lora: LoraArguments) -> LoraArguments:
        """Its adapter's settings."""
        given = {name: value for name, value in self.values.items() if name in _ADAPTER}
        return replace(lora, **given)


def is_several(training: FineTuningArguments) -> bool:
    """Whether more than one adapter is asked for."""
    return training.seeds > 1 or training.folds is not None or training.grid is not None


def asked_adapters(training: FineTuningArguments) -> list[Asked]:
    """All adapters of a run, in order.

    Raises:
        ArgumentError: an unknown setting (the message suggests the nearest), a value of the wrong
            kind, or options that contradict each other.
    """
    first = int(training.seed)
    if training.folds is not None:
        return [
            Asked(f"fold-{fold + 1}", 0, seed=first, fold=fold) for fold in range(training.folds)
        ]
    settings = _settings(training)
    if training.grid is None:
        return [Asked(f"seed-{first + i}", 0, seed=first + i) for i in range(training.seeds)]
    if training.seeds > 1 and any("seed" in values for values in settings):
        raise ArgumentError("--seeds and a seed in --grid contradict each other: keep one.")
    width = len(str(len(settings)))
    asked = []
    for number, values in enumerate(settings):
        name = f"run-{number + 1:0{width}d}"
        begin = int(values.get("seed", first))
        seeds = range(begin, begin + training.seeds)
        names = [f"{name}-seed-{seed}" for seed in seeds] if training.seeds > 1 else [name]
        asked += [
            Asked(each, number, values, seed) for each, seed in zip(names, seeds, strict=True)
        ]
    return asked


def _settings(training: FineTuningArguments) -> list[dict[str, Any]]:
    """Every setting of the grid, typed; one without values where there is no grid."""
    if training.grid is None:
        return [{}]
    grid = _checked(read_grid(training.grid))
    # Imported here: it takes longer than all else in this file, and most runs have no grid.
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    size = len(ParameterGrid(grid))
    if not 1 <= size <= _MOST_SETTINGS:
        raise ArgumentError(
            f"--grid has {size:,} settings: give 1 to {_MOST_SETTINGS:,}, or fewer values."
        )
    if training.samples is None:
        return [dict(one) for one in ParameterGrid(grid)]
    count = min(training.samples, size)
    chosen = ParameterSampler(grid, n_iter=count, random_state=int(training.seed))
    return [dict(one) for one in chosen]


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


def _checked(grids: Sequence[Mapping[str, Sequence[Any]]]) -> list[dict[str, list[Any]]]:
    """The grid with values as the options have them."""
    return [
        {name: [_typed(name, value) for value in values] for name, values in one.items()}
        for one in grids
    ]


def _typed(name: str, value: Any) -> Any:
    """A value as the option's own parser reads it."""
    every = [*KEYS, *(one.name for one in fields(FineTuningArguments))]
    if name not in KEYS:
        if name in every:
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
    owner = LoraArguments if name in _ADAPTER else FineTuningArguments
    try:
        [values] = OptionParser((owner,)).parse_values([f"--{name}", *texts])
    except ArgumentError as error:
        # Upstream's parser takes every option with dashes for underscores as well.
        reason = str(error).removesuffix(" See --help.").partition(": ")[2]
        raise ArgumentError(f"--grid {name}={'+'.join(texts)}: {reason}") from error
    typed = values[name]
    return json.loads(typed) if name == "lora_kwargs" and isinstance(typed, str) else typed
