"""How far a choice among several settings can be trusted, from their answers to the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_fsdp.evaluation.intervals import CONFIDENCE, Interval, PairedBootstrap
from lora_fsdp.evaluation.outputs import TUNED
from lora_fsdp.evaluation.verdict import columns_after, scores_by_system
from lora_fsdp.sweeps.outcome.member import MemberResult, is_loss
from lora_fsdp.tasks.answers.kind import PROBABILITY_OF, SCORE_BY, WEIGHT_BY


@dataclass(frozen=True)
class Choice:
    """The best of several settings by the validation rows.

    Attributes:
        setting: its number.
        score: its mean over its adapters, on the validation rows.
        corrected: the same without what choosing the best of so many adds to it, on average over
            resampled rows.
        not_worse: the other settings whose difference to it may be chance (95 % for all of them
            together, paired by row).
    """

    setting: int
    score: float
    corrected: float
    not_worse: Sequence[int]


def over_rows(members: Sequence[MemberResult], metric: str) -> Interval | None:
    """The mean over adapters of one setting with its interval over the held-out rows alone.

    `None` where the metric cannot be worked out from the rows, or the adapters have other rows.
    """
    found = _scores({0: list(members)}, metric)
    if found is None:
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(found[0][1:], [tail, 100 - tail])
    return Interval(float(found[0][0]), float(low), float(high))


def chosen(settings: Mapping[int, Sequence[MemberResult]], best: int, metric: str) -> Choice | None:
    """What can be said of choosing `best`; `None` where the metric is not known row by row.

    The choice is made anew on each of 2,000 resamples of the rows. By how much the setting chosen
    there scores better on the resample than on the rows as they are is the optimism; it grows with
    the number of settings and is subtracted.

    Source: Efron, "Estimating the Error Rate of a Prediction Rule", JASA 78 (1983): the bootstrap's
    estimate of optimism, with the choice of the setting as the rule.

    Args:
        settings: the adapters of each setting that may be chosen, by its number.
        best: the one that was.
        metric: that decides.
    """
    found = _scores({number: list(members) for number, members in settings.items()}, metric)
    if found is None or len(found) < 2:
        return None
    sign = -1 if is_loss(metric) else 1
    numbers = list(found)
    table = sign * np.stack([found[number] for number in numbers])  # [settings, 1 + draws]
    drawn = table[:, 1:]
    # Of some metrics a resample's mean is not that of the rows (macro-F1 of a rare label).
    centred = drawn - drawn.mean(axis=1, keepdims=True) + table[:, :1]
    picked = centred.argmax(axis=0)
    optimism = (centred[picked, np.arange(drawn.shape[1])] - table[picked, 0]).mean()
    place = numbers.index(best)
    # The best is above the others by definition: both tails of a difference are its own.
    tail = 100 * (1 - CONFIDENCE) / 2 / (len(numbers) - 1)
    behind = np.percentile(drawn[place] - drawn, tail, axis=1)
    return Choice(
        best,
        float(sign * table[place, 0]),
        float(sign * (table[place, 0] - optimism)),
        [
            number
            for number, low in zip(numbers, behind, strict=True)
            if low <= 0 and number != best
        ],
    )


def _scores(
    settings: Mapping[int, Sequence[MemberResult]], metric: str
) -> dict[int, np.ndarray] | None:
    """[1 + draws] of each setting, the mean over its adapters, from the same resampled rows."""
    members = {one.name: one for own in settings.values() for one in own}
    tables = {name: one.predictions for name, one in members.items()}
    known = {name: table for name, table in tables.items() if table is not None and len(table)}
    if not known or len(known) < len(members):
        return None
    first = next(iter(known.values()))
    if any(
        not table[["row", "target"]].equals(first[["row", "target"]]) for table in known.values()
    ):
        return None
    labels = list(
        dict.fromkeys(label for t in known.values() for label in columns_after(PROBABILITY_OF, t))
    )

    def of_rows(prefix: str) -> dict[tuple[str, str], list[float]]:
        return {
            (name, by): values
            for name, table in known.items()
            for (system, by), values in scores_by_system(prefix, table).items()
            if system == TUNED
        }

    bootstrap = PairedBootstrap(
        first["target"].tolist(),
        {name: table["tuned"].fillna("").tolist() for name, table in known.items()},
        labels=labels,
        scores=of_rows(SCORE_BY),
        weights=of_rows(WEIGHT_BY),
    )
    # A task's own metric may have the name of another: its figures would not be these.
    for name, one in members.items():
        if not bootstrap.knows(name, metric):
            return None
        if not np.isclose(bootstrap.scores(name, metric)[0], one.score(metric), atol=1e-6):
            return None
    return {
        number: np.mean([bootstrap.scores(one.name, metric) for one in own], axis=0)
        for number, own in settings.items()
    }
