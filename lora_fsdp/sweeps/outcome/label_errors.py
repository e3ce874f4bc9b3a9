"""Rows that may be labelled wrongly, by adapters that have not learnt from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from lora_fsdp.evaluation.comparison import write_predictions
from lora_fsdp.reporting.recording.label_errors import suspected_label_errors
from lora_fsdp.sweeps.earlier import LABEL_ERRORS_FILE
from lora_fsdp.tasks import Task
from lora_fsdp.tasks.answers.kind import AnswerKind, Labelled


def label_errors(pooled: pd.DataFrame, kind: AnswerKind) -> pd.DataFrame:
    """The rows whose label the adapters confidently disagree with, the strongest first.

    Where rows answer several questions, or have a yes or no for each of several labels, each of
    these is looked at by itself.

    Args:
        pooled: all N rows as `out_of_fold.csv` has them.
        kind: the task's, which knows what a row is labelled with (`AnswerKind.labelled`).

    Returns:
        `row` (its number in the user's file), `question` where there are several, `given_label`,
        `suggested_label`, `probability` (of the suggested one), `probability_of_given`, `fold`,
        `text`.
    """
    parts = [_of_question(pooled, one) for one in kind.labelled(pooled)]
    found = pd.concat(parts, ignore_index=True)
    lead = found["probability"] - found["probability_of_given"]
    found = found.loc[lead.sort_values(ascending=False, kind="stable").index]
    if [part.attrs["question"] for part in parts] == [""]:
        found = found.drop(columns="question")
    return found.reset_index(drop=True)


def _of_question(pooled: pd.DataFrame, one: Labelled) -> pd.DataFrame:
    known = np.array([given is not None for given in one.given], dtype=bool)
    places = np.flatnonzero(known)
    given = [str(one.given[place]) for place in places.tolist()]
    found = suspected_label_errors(given, one.probabilities[places], list(one.options))
    rows = pooled.iloc[places[found["position"].to_numpy(dtype=int)]].reset_index(drop=True)
    table = pd.DataFrame(
        {
            "row": rows["row"],
            "question": one.name,
            "given_label": found["given"],
            "suggested_label": found["suggested"],
            "probability": found["probability_suggested"],
            "probability_of_given": found["probability_given"],
            "fold": rows["fold"],
            "text": rows["text"],
        }
    )
    table.attrs["question"] = one.name
    return table


def write_label_errors(pooled: pd.DataFrame | None, task: Task, root: Path) -> str | None:
    """Write `label_errors.csv`; returns a line about it, or `None` where nothing was looked for.

    Args:
        pooled: all rows, answered out of fold; `None` = there are no folds, or not of all rows.
        task: whose answers they are.
        root: the run's folder.
    """
    if pooled is None:
        return None
    kind = task.answer_kind
    if not kind.labelled(pooled):
        return (
            f"No {LABEL_ERRORS_FILE}: wrong labels are found among rows with one right answer of a "
            f"set, and those of task {task.name!r} have {kind.description}."
        )
    found = label_errors(pooled, kind)
    write_predictions(found, root / LABEL_ERRORS_FILE)
    rows = found["row"].nunique()
    more = f" (in {len(found)} of their answers)" if len(found) > rows else ""
    return (
        f"{rows} of {len(pooled)} rows may be labelled wrongly{more}, by adapters that had not "
        f"learnt from them: {root / LABEL_ERRORS_FILE}"
    )
