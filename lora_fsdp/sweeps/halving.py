"""Successive halving: all settings begin, and at each stage the best third goes on.

Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", AISTATS 2016; factor and stages as scikit-learn's `HalvingRandomSearchCV` has them by
default, with a setting's own optimizer steps as what is rationed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fsdp.base.folders import read_json_object
from lora_fsdp.errors import DamagedRunError
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.sweeps.earlier import HALVING_FILE

FACTOR = 3


@dataclass(frozen=True)
class Stage:
    """Up to where the settings that are left are trained.

    Attributes:
        number: from 0; the last one trains to the end.
        share: of each adapter's optimizer steps.
        settings: how many begin it.
    """

    number: int
    share: float
    settings: int

    @property
    def described(self) -> str:
        """Where it ends, in words."""
        return f"1/{round(1 / self.share)} of its steps (successive halving)"


def stages(settings: int) -> list[Stage]:
    """Of so many settings; one stage where there are too few to leave any out."""
    last = 0
    while FACTOR ** (last + 1) <= settings:
        last += 1
    found = []
    for number in range(last + 1):
        found.append(Stage(number, float(FACTOR) ** (number - last), settings))
        settings = math.ceil(settings / FACTOR)
    return found


def step_at(share: float, last: int) -> int:
    """The optimizer step of an adapter's `last` ones at which a stage ends."""
    return last if share >= 1 else max(1, round(share * last))


def best_settings(
    scores: Mapping[str, float | None], setting_of: Mapping[str, int], *, keep: int, sign: int
) -> list[int]:
    """The settings that go on, by the mean over their adapters.

    Args:
        scores: of each adapter at the end of the stage; `None` if it has diverged.
        setting_of: each adapter's setting.
        keep: how many go on.
        sign: 1 where more is better, -1 where less is.
    """
    by_setting: dict[int, list[float | None]] = {}
    for name, score in scores.items():
        by_setting.setdefault(setting_of[name], []).append(score)

    def rank(number: int) -> tuple[bool, float, int]:
        known = [score for score in by_setting[number] if score is not None]
        whole = len(known) == len(by_setting[number])
        return (not whole, -sign * sum(known) / len(known) if known else 0.0, number)

    return sorted(sorted(by_setting, key=rank)[:keep])


@dataclass
class Scores:
    """What each adapter scored at the end of each stage, kept in the run's folder.

    Attributes:
        root: the folder.
        by_stage: for each stage the score by the adapter's name; `None` = it has diverged.
    """

    root: Path
    by_stage: list[dict[str, float | None]]

    @classmethod
    def begin(cls, root: Path, resumes: bool) -> Scores:
        """Those of an earlier session that is gone on with; none where there was none.

        Raises:
            DamagedRunError: the file is not as it was written.
        """
        if not resumes or not (root / HALVING_FILE).is_file():
            return cls(root, [])
        found: Any = read_json_object(root, HALVING_FILE).get("scores")
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise DamagedRunError(f"{root / HALVING_FILE} does not have the form of a run's.")
        return cls(root, found)

    def at(self, stage: int) -> dict[str, float | None]:
        """Of one stage, as far as it is known."""
        while len(self.by_stage) <= stage:
            self.by_stage.append({})
        return self.by_stage[stage]

    def save(self) -> None:
        """Write the file; for one rank to call."""
        write_json(self.root / HALVING_FILE, {"factor": FACTOR, "scores": self.by_stage})
