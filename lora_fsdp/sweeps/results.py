"""What several adapters came to: a figure and its spread, the best setting, one table for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.evaluation.comparison import write_predictions
from lora_fsdp.evaluation.outputs import TUNED, UNTRAINED, shown_metrics, write_json
from lora_fsdp.evaluation.verdict import name_of, score_table, score_text
from lora_fsdp.sweeps.earlier import OUT_OF_FOLD_FILE, SWEEP_FILE

# Lower is better.
_LOSSES = ("loss",)


@dataclass(frozen=True)
class MemberResult:
    """What one adapter came to.

    Attributes:
        name: of its folder.
        setting: number of its setting.
        values: what the grid sets.
        seed, fold: as in `Asked`.
        stopped: why it was stopped before its end; it has no scores then.
        metrics: of every system, as in `metrics.json`.
        predictions: row by row, as in `predictions.csv`.
        test: the tuned model's metrics on the test rows, if there are any.
    """

    name: str
    setting: int
    values: Mapping[str, Any]
    seed: int
    fold: int | None
    stopped: str | None
    metrics: Mapping[str, Mapping[str, float]]
    predictions: pd.DataFrame | None
    test: Mapping[str, float] | None = None

    def score(self, metric: str) -> float:
        """The tuned model's; NaN if it was stopped."""
        return float(self.metrics.get(TUNED, {}).get(metric, math.nan))


@dataclass(frozen=True)
class Spread:
    """A mean over adapters with its standard deviation.

    Attributes:
        mean: of those that were trained to their end.
        deviation: standard deviation over them (n - 1); NaN for a single one.
        count: how many there are.
    """

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of all `values` that are numbers."""
        known = np.array([value for value in values if not math.isnan(value)], dtype=float)
        mean = float(known.mean()) if len(known) else math.nan
        deviation = float(known.std(ddof=1)) if len(known) > 1 else math.nan
        return cls(mean, deviation, len(known))

    def __str__(self) -> str:
        if math.isnan(self.deviation):
            return score_text(self.mean)
        return f"{score_text(self.mean)} ± {score_text(self.deviation)}"


@dataclass(frozen=True)
class Summary:
    """All adapters of a run.

    Attributes:
        members: in the order in which they were asked for.
        primary_metric: the metric that decides.
        over: what the adapters of one setting differ in: "seeds" or "folds".
        chooses: whether the best of several settings is chosen.
    """

    members: Sequence[MemberResult]
    primary_metric: str
    over: str
    chooses: bool

    @property
    def settings(self) -> dict[int, list[MemberResult]]:
        """Adapters by the number of their setting."""
        found: dict[int, list[MemberResult]] = {}
        for member in self.members:
            found.setdefault(member.setting, []).append(member)
        return found

    def spread(self, setting: int, metric: str | None = None) -> Spread:
        """Of the tuned models of one setting, on the rows that were held out for them."""
        name = metric or self.primary_metric
        return Spread.of([member.score(name) for member in self.settings[setting]])

    @property
    def best(self) -> int | None:
        """The setting with the best mean on its validation rows; `None` if all have diverged.

        One of whose adapters some have diverged is no choice.
        """
        whole = {
            number: self.spread(number).mean
            for number, members in self.settings.items()
            if not any(member.stopped for member in members)
        }
        whole = {number: mean for number, mean in whole.items() if not math.isnan(mean)}
        if not whole:
            return None
        sign = -1 if self.primary_metric in _LOSSES else 1
        return max(whole, key=lambda number: sign * whole[number])

    @property
    def pooled(self) -> pd.DataFrame | None:
        """With folds: all rows, each answered by the adapter that had not learnt from it."""
        tables = [member.predictions for member in self.members]
        if self.over != "folds" or any(table is None for table in tables):
            return None
        numbered = [
            table.assign(fold=number + 1)
            for number, table in enumerate(tables)
            if table is not None
        ]
        return pd.concat(numbered).sort_values("row", kind="stable", ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        metrics = self._shown()
        return {
            "primary_metric": self.primary_metric,
            "over": self.over,
            "members": [
                {
                    "name": one.name,
                    "setting": one.setting,
                    "values": dict(one.values),
                    "seed": one.seed,
                    "fold": one.fold,
                    "stopped": one.stopped,
                    "metrics": dict(one.metrics.get(TUNED, {})),
                }
                for one in self.members
            ],
            "settings": [
                {
                    "setting": number,
                    "values": dict(members[0].values),
                    "spread": {
                        metric: _finite(vars(self.spread(number, metric))) for metric in metrics
                    },
                }
                for number, members in self.settings.items()
            ],
            "best": self._best_json(),
        }

    def save(self, root: Path) -> None:
        """Write `sweep.json`, and with folds `out_of_fold.csv`, into the run's folder."""
        if (pooled := self.pooled) is not None:
            write_predictions(pooled, root / OUT_OF_FOLD_FILE)
        write_json(root / SWEEP_FILE, self.to_json())

    def __str__(self) -> str:
        return "\n".join([*self._table(), "", *self._conclusion()])

    # ---- in words -------------------------------------------------------------------------------

    def _shown(self) -> list[str]:
        known = [one for one in self.members if one.metrics]
        return shown_metrics(known[0].metrics[TUNED], primary=self.primary_metric) if known else []

    def _table(self) -> list[str]:
        metrics = self._shown()
        keys = list(dict.fromkeys(key for one in self.members for key in one.values))
        header = ["adapter", *keys, *map(name_of, metrics)]
        lines = []
        for one in self.members:
            values = [str(one.values.get(key, "")) for key in keys]
            scores = [score_text(one.score(metric)) for metric in metrics]
            lines.append([one.name, *values, *(scores if not one.stopped else [one.stopped])])
        widths = [
            max(len(line[place]) for line in [header, *lines] if len(line) == len(header))
            if any(len(line) == len(header) for line in lines)
            else len(header[place])
            for place in range(len(header))
        ]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
            for line in [header, *lines]
        ]

    def _conclusion(self) -> list[str]:
        metric = name_of(self.primary_metric)
        if (best := self.best) is None:
            return ["Every adapter diverged: lower --learning_rate."]
        members = self.settings[best]
        spread = self.spread(best)
        what = f"{metric[:1].upper()}{metric[1:]}"
        if self.over == "folds":
            return [self._pooled_line(what, spread)]
        if not self.chooses:
            line = f"{what} {spread} (mean ± standard deviation over {spread.count} seeds)."
            return [line, self._rows_line(members), self._untrained_line(members)]
        values = ", ".join(f"{key} {value}" for key, value in members[0].values.items())
        count = len(self.settings)
        lines = [
            f"Best of {count} settings by {metric} on {_rows(members)} validation rows: {values} "
            f"({spread}{'' if spread.count == 1 else f', {spread.count} seeds'})."
        ]
        if members[0].test is not None:
            test = Spread.of([float((one.test or {})[self.primary_metric]) for one in members])
            lines.append(
                f"On the test rows, by which nothing was chosen: {test}. The figure on the "
                f"validation rows is the best of {count} and so too high."
            )
        return lines

    def _pooled_line(self, what: str, spread: Spread) -> str:
        pooled = self.pooled
        line = f"{what} {spread} (mean ± standard deviation over {spread.count} folds)"
        return (
            f"{line}."
            if pooled is None
            else f"{line}; every one of {len(pooled)} rows was "
            "answered by an adapter that had not learnt from it."
        )

    def _rows_line(self, members: Sequence[MemberResult]) -> str:
        """How far the held-out rows alone let one adapter's figure vary."""
        known = [one for one in members if one.predictions is not None]
        scores = [one.score(self.primary_metric) for one in known]
        middle = known[int(np.argsort(scores)[(len(scores) - 1) // 2])]
        table = score_table(middle.metrics, middle.predictions, primary=self.primary_metric)
        found = next(
            line["scores"][self.primary_metric]
            for line in table["systems"]
            if line["system"] == TUNED
        )
        rows = _rows(members)
        if found["low"] is None:
            return f"Over the {rows} held-out rows this metric has no interval."
        low, high = score_text(found["low"]), score_text(found["high"])
        return (
            f"Apart from that, other held-out rows would move it: {low} to {high} (95 % interval "
            f"of {middle.name} over {rows} rows)."
        )

    def _untrained_line(self, members: Sequence[MemberResult]) -> str:
        untrained = members[0].metrics.get(UNTRAINED, {}).get(self.primary_metric, math.nan)
        return f"The untrained model: {score_text(untrained)}."

    def _best_json(self) -> dict[str, Any] | None:
        best = self.best
        if not self.chooses or best is None:
            return None
        members = self.settings[best]
        test = [one.test[self.primary_metric] for one in members if one.test is not None]
        return {
            "setting": best,
            "values": dict(members[0].values),
            "adapters": [one.name for one in members],
            "settings_tried": len(self.settings),
            "validation": _finite(vars(self.spread(best))),
            "test": _finite(vars(Spread.of(test))) if test else None,
        }


def _rows(members: Sequence[MemberResult]) -> int:
    return next((len(one.predictions) for one in members if one.predictions is not None), 0)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
