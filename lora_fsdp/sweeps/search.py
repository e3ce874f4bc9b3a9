"""Which of the settings that a grid describes are tried: all, or some at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.errors import ArgumentError
from lora_fsdp.sweeps.values import Range, checked_grid, read_grid

#: More is a mistake, not a sweep.
_MOST_SETTINGS = 1000


def tried_settings(training: FineTuningArguments) -> list[dict[str, Any]]:
    """The settings of a run, typed; one without values where there is no grid.

    Raises:
        ArgumentError: `--grid`, `--search` and `--trials` do not fit each other.
    """
    if training.grid is None:
        if training.trials is not None or training.search != "grid":
            named = "trials" if training.trials is not None else f"search {training.search}"
            raise ArgumentError(f"--{named} takes settings of a --grid: give one.")
        return [{}]
    grid = checked_grid(read_grid(training.grid))
    ranges = [name for one in grid for name, values in one.items() if _has_range(name, values)]
    if training.search == "grid" and training.trials is not None:
        raise ArgumentError(
            "--trials takes settings at random, and --search grid takes all: give --search random "
            "or --search halving."
        )
    if training.search == "random" and training.trials is None:
        raise ArgumentError("--search random needs --trials: how many settings to draw.")
    if ranges and training.trials is None:
        raise ArgumentError(
            f"--grid {ranges[0]} is a range, of which values are drawn: give --search random and "
            "--trials."
        )
    if ranges:
        return _drawn(grid, int(training.trials or 1), seed=int(training.seed))
    # Imported here: it takes longer than all else in this file, and most runs have no grid.
    from sklearn.model_selection import ParameterGrid

    size = len(ParameterGrid(grid))
    if not 1 <= size <= _MOST_SETTINGS:
        raise ArgumentError(
            f"--grid has {size:,} settings: give 1 to {_MOST_SETTINGS:,}, or fewer values."
        )
    if training.trials is None:
        return [dict(one) for one in ParameterGrid(grid)]
    return _drawn(grid, min(training.trials, size), seed=int(training.seed))


def _has_range(name: str, values: Sequence[Any]) -> bool:
    found = any(isinstance(value, Range) for value in values)
    if found and len(values) > 1:
        raise ArgumentError(f"--grid {name}: give a range, or values; not both.")
    return found


def _drawn(
    grid: Sequence[Mapping[str, Sequence[Any]]], count: int, *, seed: int
) -> list[dict[str, Any]]:
    """So many settings, seeded; without ranges, all of them different."""
    if count > _MOST_SETTINGS:
        raise ArgumentError(f"--trials {count:,}: give at most {_MOST_SETTINGS:,}.")
    from sklearn.model_selection import ParameterSampler

    spaces = [{name: _space(values) for name, values in one.items()} for one in grid]
    chosen = ParameterSampler(spaces, n_iter=count, random_state=seed)
    return [{name: _plain(value) for name, value in one.items()} for one in chosen]


def _space(values: Sequence[Any]) -> Any:
    """What scikit-learn draws from."""
    from scipy.stats import loguniform, randint, uniform

    if not isinstance(values[0], Range):
        return values
    low, high = values[0].low, values[0].high
    if isinstance(low, int) and isinstance(high, int):
        return randint(low, high + 1)
    # What spans orders of magnitude is drawn by its logarithm.
    return loguniform(low, high) if low > 0 else uniform(low, high - low)


def _plain(value: Any) -> Any:
    """Without numpy's types, and short enough to be read in a table."""
    import numpy as np

    if isinstance(value, np.integer):
        return int(value)
    return float(f"{value:.3g}") if isinstance(value, np.floating) else value
