"""What is odd about the rows: repeated texts, contradicting labels, leaks, lengths, balance."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lora_fsdp.evaluation.baselines import tfidf_out_of_fold
from lora_fsdp.reporting.recording.label_errors import listed_suspects, suspected_label_errors
from lora_fsdp.reporting.texts import one_line

TRAINING, HELD_OUT = "training", "held out"
_SHOWN = 10
_FOLDS = 5
_MOST_ROWS_CROSS_VALIDATED = 10_000
_LINK_OR_HANDLE = re.compile(r"https?://\S+|www\.\S+|@\w+")
_NOT_A_WORD = re.compile(r"[\W_]+")


def data_health(rows: pd.DataFrame, *, labels: Sequence[str]) -> dict[str, Any]:
    """Facts about training and held-out rows, JSON-ready.

    Args:
        rows: `part` ("training" or "held out"), `row`, `text`, `answer`, `tokens` (of the whole
            example), `shortened`.
        labels: the label set; without one there is no balance, and there are no label errors.
    """
    rows = rows.reset_index(drop=True)
    exact = rows["text"].str.strip()
    near = exact.map(normalised)
    # A text of links and signs only is like no other.
    near = near.where(near != "", other="\0" + exact)
    health: dict[str, Any] = {
        "exact_duplicates": _repeated(rows, exact),
        "near_duplicates": _repeated(rows, near, beyond=exact),
        "contradictions": _contradictions(rows, near),
        "leaks": {"exact": _leaks(rows, exact), "near": _leaks(rows, near, beyond=exact)},
        "tokens": {
            str(part): _spread(group["tokens"]) for part, group in rows.groupby("part", sort=False)
        },
        "shortened": {
            "count": int(rows["shortened"].sum()),
            "rows": _listed(rows[rows["shortened"]].head(_SHOWN)),
        },
        "balance": None,
        "suspected_training_labels": None,
    }
    if labels:
        counts = pd.crosstab(rows["answer"], rows["part"])
        counts = counts.reindex(index=list(labels), columns=[TRAINING, HELD_OUT], fill_value=0)
        health["balance"] = {
            one_line(label, limit=80): {"training": int(train), "held_out": int(held)}
            for label, train, held in counts.itertuples()
        }
        health["suspected_training_labels"] = _suspected(rows[rows["part"] == TRAINING])
    return health


def normalised(text: str) -> str:
    """`text` without what near-duplicates differ in: case, links, @handles, signs, spaces."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _NOT_A_WORD.sub(" ", _LINK_OR_HANDLE.sub(" ", plain)).strip()


def _repeated(
    rows: pd.DataFrame, key: pd.Series, *, beyond: pd.Series | None = None
) -> dict[str, Any]:
    """Groups of rows with one key; `beyond` leaves out those that are also one by that key."""
    sizes = key.groupby(key).transform("size")
    repeated = sizes > 1
    if beyond is not None:
        repeated &= beyond.groupby(key).transform("nunique") > 1
    groups = rows[repeated].groupby(key[repeated], sort=False)
    largest = sorted(groups, key=lambda item: -len(item[1]))[:_SHOWN]
    return {
        "groups": int(groups.ngroups),
        "rows": int(repeated.sum()),
        "largest": [_listed(group.head(_SHOWN)) for _, group in largest],
    }


def _contradictions(rows: pd.DataFrame, key: pd.Series) -> dict[str, Any]:
    """Groups of rows with one normalised text and different answers."""
    different = rows["answer"].groupby(key).transform("nunique") > 1
    groups = rows[different].groupby(key[different], sort=False)
    return {
        "groups": int(groups.ngroups),
        "rows": int(different.sum()),
        "first": [_listed(group.head(_SHOWN)) for _, group in list(groups)[:_SHOWN]],
    }


def _leaks(
    rows: pd.DataFrame, key: pd.Series, *, beyond: pd.Series | None = None
) -> dict[str, Any]:
    """Held-out rows whose text was trained on; `beyond` leaves out what leaks by that key."""
    in_training = rows["part"] == TRAINING
    leaks = ~in_training & key.isin(set(key[in_training]))
    if beyond is not None:
        leaks &= ~beyond.isin(set(beyond[in_training]))
    return {"rows": int(leaks.sum()), "first": _listed(rows[leaks].head(_SHOWN))}


def _spread(tokens: pd.Series) -> dict[str, float]:
    if tokens.empty:
        return {}
    return {
        "least": int(tokens.min()),
        "median": float(tokens.median()),
        "percentile_95": float(np.percentile(tokens, 95)),
        "most": int(tokens.max()),
        "mean": float(tokens.mean()),
        "total": int(tokens.sum()),
    }


def _suspected(train: pd.DataFrame) -> dict[str, Any] | None:
    """Suspected label errors among the training rows, by the cross-validated TF-IDF baseline.

    `None` where there is too little to learn from. Labels rarer than the number of folds are left
    out; of very many rows a seeded sample is looked at.
    """
    frequencies = Counter(train["answer"])
    labels = sorted(label for label, count in frequencies.items() if count >= _FOLDS)
    train = train[train["answer"].isin(labels)]
    if len(train) > _MOST_ROWS_CROSS_VALIDATED:
        train = train.sample(_MOST_ROWS_CROSS_VALIDATED, random_state=0)
        frequencies = Counter(train["answer"])
        labels = sorted(label for label in labels if frequencies[label] >= _FOLDS)
        train = train[train["answer"].isin(labels)]
    if len(labels) < 2:
        return None
    answers = train["answer"].tolist()
    probabilities = tfidf_out_of_fold(train["text"].tolist(), answers, folds=_FOLDS)
    if probabilities is None:
        return None
    found = suspected_label_errors(answers, probabilities, labels)
    return listed_suspects(train, found, _listed)


def _listed(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            "part": str(row.part),
            "row": int(row.row),
            "text": one_line(row.text),
            "answer": one_line(row.answer, limit=80),
        }
        for row in rows.itertuples(index=False)
    ]
