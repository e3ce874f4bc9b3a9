"""The tuned model's answers row by row: confusions, confident mistakes, suspected label errors."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lora_fsdp.evaluation.verdict import columns_after
from lora_fsdp.reporting.recording.label_errors import listed_suspects, suspected_label_errors
from lora_fsdp.reporting.run_files import RunFiles
from lora_fsdp.reporting.sections.calibration import answered_and_right, calibration
from lora_fsdp.reporting.texts import one_line
from lora_fsdp.tasks.answers.kind import PROBABILITY_OF

_CONFUSIONS, _ROWS_A_CONFUSION, _MISTAKES, _SAMPLES = 6, 2, 10, 6
# More cells than this are not a table that anyone reads.
_MOST_LABELS_IN_MATRIX = 120


def choices_section(predictions: pd.DataFrame) -> dict[str, Any]:
    """What the answers to questions with choices of their own show, JSON-ready."""
    right = predictions["tuned"] == predictions["target"]
    mistakes = predictions[~right]
    probabilities = predictions["probability"].to_numpy()
    return {
        "rows": len(predictions),
        "mistakes": len(mistakes),
        "confident_mistakes": _lines(_by_confidence(mistakes).head(_MISTAKES)),
        "calibration": calibration(probabilities, right.to_numpy()),
        "levels": answered_and_right(probabilities, right.to_numpy()),
    }


def labels_section(predictions: pd.DataFrame) -> dict[str, Any]:
    """What the answers from a closed label set show beside that, JSON-ready."""
    labels = list(columns_after(PROBABILITY_OF, predictions))
    return choices_section(predictions) | {
        "matrix": _matrix(predictions, labels),
        "by_label": _by_label(predictions, labels),
        "confusions": _confusions(predictions[predictions["tuned"] != predictions["target"]]),
        "suspected_labels": _suspected(predictions, labels),
    }


def free_text_section(predictions: pd.DataFrame) -> dict[str, Any]:
    """Which held-out targets the tuned model generates exactly, with samples, JSON-ready."""
    right = (predictions["tuned"] == predictions["target"]) & (predictions["tuned"] != "")
    return {
        "rows": len(predictions),
        "exact": int(right.sum()),
        "exact_untrained": int(
            ((predictions["base"] == predictions["target"]) & (predictions["base"] != "")).sum()
        ),
        "written": _lines(predictions[right].head(_SAMPLES)),
        "not_written": _lines(predictions[~right].head(_SAMPLES)),
    }


def generated_section(run: RunFiles) -> list[dict[str, Any]]:
    """The text that both models generated freely, beside the row's text and target."""
    if run.metrics is None:
        return []
    known: dict[int, Any] = {}
    if run.predictions is not None:
        known = {int(line["row"]): line for line in run.predictions.to_dict("records")}
    shown = []
    for entry in run.metrics.get("written") or []:
        row = known.get(int(entry["row"]), {})
        facts: dict[str, Any] = {"row": int(entry["row"])}
        facts |= {name: one_line(row.get(name, "")) for name in ("text", "target")}
        for who in ("base", "tuned"):
            text, answer = entry[who]["text"], entry[who]["answer"]
            shown_answer = None if answer is None else one_line(answer)
            facts[who] = {"text": one_line(text), "answer": shown_answer}
        shown.append(facts)
    return shown


def _matrix(predictions: pd.DataFrame, labels: list[str]) -> dict[str, Any] | None:
    if len(labels) > _MOST_LABELS_IN_MATRIX:
        return None
    counts = pd.crosstab(predictions["target"], predictions["tuned"])
    counts = counts.reindex(index=labels, columns=labels, fill_value=0)
    return {
        "labels": [one_line(label, limit=60) for label in labels],
        "counts": counts.to_numpy().tolist(),
    }


def _by_label(predictions: pd.DataFrame, labels: list[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each label; the label with the lowest F1 first."""
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(
        predictions["target"], predictions["tuned"], labels=labels, zero_division=0
    )
    lines = [
        {
            "label": one_line(label, limit=80),
            "rows": int(support),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
        }
        for label, precision, recall, f1, support in zip(labels, *scores, strict=True)
    ]
    return sorted(lines, key=lambda line: line["f1"])


def _confusions(mistakes: pd.DataFrame) -> list[dict[str, Any]]:
    groups = sorted(
        mistakes.groupby(["target", "tuned"], sort=True), key=lambda group: -len(group[1])
    )
    return [
        {
            "target": one_line(target, limit=80),
            "tuned": one_line(tuned, limit=80),
            "count": len(group),
            "rows": _lines(_by_confidence(group).head(_ROWS_A_CONFUSION)),
        }
        for (target, tuned), group in groups[:_CONFUSIONS]
    ]


def _suspected(predictions: pd.DataFrame, labels: list[str]) -> dict[str, Any]:
    known = predictions[predictions["target"].isin(labels)]
    columns = [f"{PROBABILITY_OF}{label}" for label in labels]
    found = suspected_label_errors(known["target"].tolist(), known[columns].to_numpy(), labels)
    return listed_suspects(known, found, _lines)


def _by_confidence(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values("probability", ascending=False, kind="stable")


def _lines(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            "row": int(row.row),
            "text": one_line(row.text, limit=200),
            "target": one_line(row.target, limit=80),
            "tuned": one_line(row.tuned, limit=80),
            "probability": float(row.probability),
        }
        for row in rows.itertuples(index=False)
    ]
