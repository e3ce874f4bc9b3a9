"""The systems of a run side by side, each score with its interval, and the verdict in words.

Terminal, report, card and comparison of runs all ask here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.evaluation.intervals import (
    CONFIDENCE,
    SHARES,
    Interval,
    PairedBootstrap,
    wilson_interval,
)
from lora_fsdp.evaluation.outputs import CHANCE, PROBE, TUNED, UNTRAINED, shown_metrics
from lora_fsdp.tasks.answers.kind import MAJORITY, PROBABILITY_OF, SCORE_BY, TFIDF, WEIGHT_BY

# Below these, resampling says nothing and no verdict is given.
_LEAST_ROWS_TO_RESAMPLE = 10
_LEAST_ROWS_FOR_A_VERDICT = 30
# Columns of `predictions.csv` with a baseline's answers.
BASELINE = "baseline/"
NOTHING = "—"
NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "exact_match": "exact match",
    "loss": "loss",
    TUNED: "tuned model",
    UNTRAINED: "untrained model",
    TFIDF: "TF-IDF + logistic regression",
    MAJORITY: "majority label",
    PROBE: "frozen probe",
    CHANCE: "guess among the choices",
    "token_f1": "F1 of words",
    "field_f1": "F1 of fields",
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "valid_json": "valid JSON",
    "whole_object": "whole object",
    "weighted_f1": "weighted F1",
    "accuracy_normalised": "accuracy by token",
    "overlap": "overlap of shares",
    "brier_score": "Brier score",
    "kl_divergence": "KL divergence",
    "reward_margin": "reward margin",
    "r2": "R²",
    "answer_accuracy": "right answers",
    "micro_f1": "micro-F1",
    "micro_f1_at_thresholds": "micro-F1, chosen thresholds",
    "macro_f1_at_thresholds": "macro-F1, chosen thresholds",
    "subset_accuracy": "all labels right",
    "average": "training rows' average",
    "quadratic_kappa": "quadratic kappa",
    "mean_absolute_error": "mean absolute error",
    "root_mean_squared_error": "RMSE",
    "spearman": "Spearman's rank correlation",
    "ranked_probability_score": "ranked probability score",
}


def name_of(key: str) -> str:
    """A metric or a system as it is called in a sentence."""
    return NAMES.get(key, key)


def columns_after(prefix: str, predictions: pd.DataFrame) -> dict[str, str]:
    """The columns that begin with `prefix`, by what follows it: labels, or baselines."""
    names = [name for name in predictions.columns if name.startswith(prefix)]
    return {name.removeprefix(prefix): name for name in names}


def score_table(
    metrics: Mapping[str, Mapping[str, float]],
    predictions: pd.DataFrame | None,
    *,
    primary: str,
    rows: int | None = None,
    chosen_among: int | None = None,
    untrained_ways: int = 1,
) -> dict[str, Any]:
    """Every system's scores, the differences to the tuned model, and a verdict; JSON-ready.

    Args:
        metrics: of each system.
        predictions: the answers row by row, as in `Comparison`; no intervals without them.
        primary: the metric that decides.
        rows: how many rows were held out, where there are no predictions.
        untrained_ways: in how many ways the untrained model was asked, of which this is the best.
        chosen_among: of how many checkpoints the tuned model is the best on these very rows.
    """
    shown = shown_metrics(metrics[TUNED], primary=primary)
    if predictions is not None:
        rows = len(predictions)
    bootstrap = _bootstrap_of(predictions)
    systems = [
        {
            "system": system,
            "scores": {
                key: _score(values[key], predictions, bootstrap, system=system, metric=key)
                for key in shown
                if key in values
            },
        }
        for system, values in metrics.items()
    ]
    rivals = [system for system in metrics if system != TUNED and primary in metrics[system]]
    compared = len(rivals) + untrained_ways - 1
    differences = {
        system: _difference(metrics, bootstrap, system=system, metric=primary, of=compared)
        for system in rivals
    }
    table = {
        "rows": rows,
        "chosen_among": chosen_among,
        "compared": compared,
        "primary_metric": primary,
        "labels_without_rows": _labels_without_rows(predictions),
        "metrics": shown,
        "systems": systems,
        "differences": differences,
    }
    return table | {"verdict": _verdict(table, tuned=metrics[TUNED][primary])}


def _labels_without_rows(predictions: pd.DataFrame | None) -> dict[str, int]:
    """How many labels of the closed set are no row's right answer, and how many there are."""
    labels = [] if predictions is None else columns_after(PROBABILITY_OF, predictions)
    held_out = set() if predictions is None else set(predictions["target"])
    return {"count": sum(label not in held_out for label in labels), "of": len(labels)}


def _bootstrap_of(predictions: pd.DataFrame | None) -> PairedBootstrap | None:
    """All systems of a table of predictions on the same resampled rows."""
    if predictions is None or len(predictions) < _LEAST_ROWS_TO_RESAMPLE:
        return None
    return PairedBootstrap(
        predictions["target"].tolist(),
        {system: answers.tolist() for system, answers in _answers(predictions).items()},
        labels=list(columns_after(PROBABILITY_OF, predictions)),
        scores=scores_by_system(SCORE_BY, predictions),
        weights=scores_by_system(WEIGHT_BY, predictions),
    )


def scores_by_system(prefix: str, predictions: pd.DataFrame) -> dict[tuple[str, str], list[float]]:
    """By (system, metric) the columns that begin with `prefix`."""
    found = {}
    for name, column in columns_after(prefix, predictions).items():
        metric, _, system = name.rpartition("/")
        found[system, metric] = predictions[column].astype(float).tolist()
    return found


def _answers(predictions: pd.DataFrame) -> dict[str, pd.Series]:
    """The answers of every system in a table of predictions."""
    columns = {**columns_after(BASELINE, predictions), UNTRAINED: "base", TUNED: "tuned"}
    # No answer is "", in memory as in the file.
    return {system: predictions[column].fillna("") for system, column in columns.items()}


def _score(
    value: float,
    predictions: pd.DataFrame | None,
    bootstrap: PairedBootstrap | None,
    *,
    system: str,
    metric: str,
) -> dict[str, float | None]:
    found: list[Interval] = []
    if predictions is not None and len(predictions) > 0 and metric in SHARES:
        answers = _answers(predictions).get(system)
        if answers is not None:
            right = int((answers == predictions["target"]).sum())
            found.append(wilson_interval(right, len(predictions)))
    if bootstrap is not None and bootstrap.knows(system, metric):
        found.append(bootstrap.interval(system, metric))
    return _with_interval(float(value), found)


def _difference(
    scores: Mapping[str, Mapping[str, float]],
    bootstrap: PairedBootstrap | None,
    *,
    system: str,
    metric: str,
    of: int,
) -> dict[str, float | None]:
    """By how much the tuned model scores above `system`, with a paired interval if there is one."""
    found: list[Interval] = []
    if bootstrap is not None and all(bootstrap.knows(one, metric) for one in (TUNED, system)):
        found.append(bootstrap.difference(TUNED, system, metric, of=of))
    return _with_interval(float(scores[TUNED][metric]) - float(scores[system][metric]), found)


def _with_interval(value: float, found: Sequence[Interval]) -> dict[str, float | None]:
    """The first interval that is about this value."""
    for interval in found:
        # A task may mean something of its own by the name, or the file is of another run.
        if np.isclose(interval.value, value, atol=1e-6):
            return asdict(interval)
    return {"value": value, "low": None, "high": None}


def _verdict(table: dict[str, Any], *, tuned: float) -> dict[str, Any]:
    """Whether tuning was worth it, by the primary metric against the best of the others."""
    differences, metric = table["differences"], name_of(table["primary_metric"])
    best = min(differences, key=lambda system: differences[system]["value"])
    margin, rival = differences[best], name_of(best)
    few = table["rows"] is not None and table["rows"] < _LEAST_ROWS_FOR_A_VERDICT
    if few:
        outcome = "unclear"
        headline = f"Too few held-out rows to tell: {table['rows']}."
    elif margin["low"] is not None and margin["low"] > 0:
        outcome, headline = "yes", f"Worth it: the tuned model beats the {rival}."
    elif margin["high"] is not None and margin["high"] < 0:
        outcome, headline = "no", f"Not worth it: the {rival} is better than the tuned model."
    else:
        outcome, headline = "unclear", _unclear(margin, rival)
    return {
        "outcome": outcome,
        "headline": headline,
        "detail": _detail(table, margin, tuned=tuned),
        "rival": best,
        "winner": {"yes": "tuned", "no": best}.get(outcome),
        "metric": metric,
        "tuned": tuned,
        "rival_score": tuned - margin["value"],
        "difference": margin,
        "few_rows": few,
    }


def _unclear(margin: Mapping[str, Any], rival: str) -> str:
    """What is said where no interval lies on one side of zero."""
    leads = margin["value"] > 0
    if margin["low"] is None:
        verb = "leads" if leads else "does not lead"
        return f"The tuned model {verb} the {rival}, by a metric that has no interval."
    if leads:
        return f"Not proven: the lead over the {rival} may be chance."
    return f"Not proven: the tuned model does not lead the {rival}, which may be chance."


def _detail(table: dict[str, Any], margin: Mapping[str, Any], *, tuned: float) -> str:
    """The figures that the verdict rests on, in a sentence."""
    metric, rows = name_of(table["primary_metric"]), table["rows"]
    held_out = f" on {rows:,} held-out row{'' if rows == 1 else 's'}" if rows else ""
    interval = " (no interval: whether that is chance is not known)"
    if margin["low"] is not None:
        bounds = f"{signed_text(margin['low'])} to {signed_text(margin['high'])}"
        count = table["compared"]
        what = "rivals" if count == len(table["differences"]) else "comparisons"
        together = f" for {count} {what} together" if count > 1 else ""
        interval = f" ({100 * CONFIDENCE:.0f} % interval{together} {bounds})"
    few = ""
    if rows is not None and rows < _LEAST_ROWS_FOR_A_VERDICT:
        few = f" A verdict takes {_LEAST_ROWS_FOR_A_VERDICT} rows or more."
    absent, unmeasured = table["labels_without_rows"], ""
    if absent["count"]:
        verb = "has" if absent["count"] == 1 else "have"
        unmeasured = (
            f" {absent['count']} of {absent['of']} labels {verb} no held-out row: nothing here "
            "measures them."
        )
    return (
        f"{metric[:1].upper()}{metric[1:]} {score_text(tuned)} against "
        f"{score_text(tuned - margin['value'])}{held_out}: {signed_text(margin['value'])}"
        f"{interval}.{few}{_chosen(table)}{unmeasured}"
    )


def ways_of(facts: Mapping[str, Any]) -> int:
    """In how many ways the untrained model was asked, by what `metrics.json` says."""
    return max(1, len((facts.get("untrained") or {}).get("by_way") or {}))


def score_notes(facts: Mapping[str, Any]) -> list[str]:
    """How scores come about that a table does not say: readings, a probe, thresholds."""
    lines = []
    if (count := ways_of(facts)) > 1:
        way = facts["untrained"]["way"]
        lines.append(f"The untrained model is read {way}: the best of {count} ways on these rows.")
    if rows := facts.get("probe_rows"):
        lines.append(
            "The frozen probe, a regression on the untrained model's hidden states, has learnt "
            f"from {rows:,} training rows."
        )
    if decided := facts.get("decided"):
        lines.append(
            f"What is given as an answer, {decided['rows']:,} validation rows have decided: "
            f"{decided['says']}. For every other system the other half of these rows has."
        )
    return lines


def _chosen(table: Mapping[str, Any]) -> str:
    """That the reported rows chose the checkpoint: the best of several is too good on them."""
    count = table["chosen_among"]
    if count is None or count < 2:
        return ""
    return (
        f" The tuned model was chosen among {count} checkpoints on these rows, which makes its "
        "score too high: keep rows for a test (--test_size)."
    )


def score_text(value: float | None) -> str:
    """A score or probability with three decimals."""
    if value is None or not math.isfinite(value):
        return NOTHING
    # Without the sign of a negative zero.
    return f"{round(value, 3) + 0.0:.3f}"


def signed_text(value: float | None) -> str:
    """A difference with three decimals and its sign."""
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:+.3f}".replace("-", "\u2212")
    return "0.000" if text[1:] == "0.000" else text
