"""What several adapters came to: a figure and its spread, the best setting, one table for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.evaluation.comparison import write_predictions
from lora_fsdp.evaluation.outputs import TUNED, UNTRAINED, shown_metrics, write_json
from lora_fsdp.evaluation.verdict import name_of, score_table, score_text
from lora_fsdp.sweeps.earlier import OUT_OF_FOLD_FILE, SWEEP_FILE
from lora_fsdp.sweeps.outcome.choice import Choice, chosen, over_rows
from lora_fsdp.sweeps.outcome.member import MemberResult, Spread, is_loss


@dataclass(frozen=True)
class Summary:
    """All adapters of a run, and what they say together.

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
    def eligible(self) -> dict[int, list[MemberResult]]:
        """The settings that may be chosen: one of whose adapters some were stopped is no choice."""
        return {
            number: members
            for number, members in self.settings.items()
            if not any(member.stopped for member in members)
            and not math.isnan(self.spread(number).mean)
        }

    @property
    def best(self) -> int | None:
        """The setting with the best mean on its validation rows; `None` if all have diverged."""
        sign = -1 if is_loss(self.primary_metric) else 1
        return max(self.eligible, key=lambda number: sign * self.spread(number).mean, default=None)

    @cached_property
    def choice(self) -> Choice | None:
        """How far choosing the best can be trusted; `None` where nothing is chosen, or where the
        metric is not known row by row.
        """
        best = self.best
        if not self.chooses or best is None:
            return None
        return chosen(self.eligible, best, self.primary_metric)

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
            "chooses": self.chooses,
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
                    "over_rows": self._over_rows_json(number),
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
        return "\n".join([*self._table(), "", *self.conclusion])

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

    @property
    def conclusion(self) -> list[str]:
        """What they say together, in sentences."""
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
        lines += self._choice_lines()
        if members[0].test is not None:
            test = Spread.of([float((one.test or {})[self.primary_metric]) for one in members])
            lines.append(
                f"On the test rows, by which nothing was chosen: {test}{self._test_rows(members)}. "
                f"The figure on the validation rows is the best of {count} and so too high."
            )
        return lines

    def _choice_lines(self) -> list[str]:
        if (choice := self.choice) is None:
            return []
        others = len(self.eligible) - 1
        beside = (
            "The others are worse by more than chance."
            if not choice.not_worse
            else f"Of the other {others}, {len(choice.not_worse)} cannot be told from it on these "
            "rows."
        )
        return [
            f"Less what choosing among {others + 1} adds: {score_text(choice.corrected)}. {beside}"
        ]

    def _test_rows(self, members: Sequence[MemberResult]) -> str:
        """How far the test rows alone let one adapter's figure vary."""
        known = [one for one in members if one.test is not None and one.test_interval is not None]
        if not known:
            return ""
        scores = [float((one.test or {})[self.primary_metric]) for one in known]
        middle = known[int(np.argsort(scores)[(len(scores) - 1) // 2])]
        low, high = map(score_text, middle.test_interval or ())
        return f" (other test rows: {low} to {high}, 95 % interval of {middle.name})"

    def _over_rows_json(self, number: int) -> dict[str, Any] | None:
        members = [one for one in self.settings[number] if one.stopped is None]
        found = over_rows(members, self.primary_metric) if members else None
        return None if found is None else asdict(found)

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
            "choice": None if self.choice is None else asdict(self.choice),
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
