"""Which adapters a run of several has: settings, seeds, folds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_fsdp.arguments import FineTuningArguments, LoraArguments
from lora_fsdp.errors import ArgumentError
from lora_fsdp.sweeps.search import tried_settings
from lora_fsdp.sweeps.values import OF_ADAPTER, OF_TRAINING


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

    @property
    def training_values(self) -> dict[str, Any]:
        """What the grid sets of the training's arguments."""
        return {name: value for name, value in self.values.items() if name in OF_TRAINING}

    def arguments(self, training: FineTuningArguments, root: Path) -> FineTuningArguments:
        """Its run's own."""
        own = copy.copy(training)
        alone = {"seeds": 1, "folds": None, "grid": None, "trials": None, "search": "grid"}
        for name, value in {**alone, **self.training_values, "seed": self.seed}.items():
            setattr(own, name, value)
        own.output_dir = str(root / self.name)
        own.resume_from_checkpoint = None
        return own

    def adapter(self, lora: LoraArguments) -> LoraArguments:
        """Its adapter's settings."""
        given = {name: value for name, value in self.values.items() if name in OF_ADAPTER}
        return replace(lora, **given)


def is_several(training: FineTuningArguments) -> bool:
    """Whether more than one adapter is asked for."""
    searches = training.search != "grid" or training.trials is not None  # refused without a grid
    several = training.seeds > 1 or training.folds is not None or training.grid is not None
    return several or searches


def asked_adapters(training: FineTuningArguments) -> list[Asked]:
    """All adapters of a run, in order.

    Raises:
        ArgumentError: an unknown setting (the message suggests the nearest), a value of the wrong
            kind, or options that contradict each other.
    """
    first, settings = int(training.seed), tried_settings(training)
    if training.folds is not None:
        return [
            Asked(f"fold-{fold + 1}", 0, seed=first, fold=fold) for fold in range(training.folds)
        ]
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
