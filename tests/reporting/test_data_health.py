"""What is odd about the rows. Run: python -m pytest tests/reporting/test_data_health.py"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from lora_fsdp.reporting.recording.data_health import data_health, normalised
from lora_fsdp.reporting.texts import one_line


def table(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"part": part, "row": n, "text": text, "answer": answer, "tokens": 10 + n}
            for n, (part, text, answer) in enumerate(rows, start=1)
        ]
    ).assign(shortened=False)


ODD = [
    ("training", "late again", "bad"),
    ("training", " late again ", "bad"),
    ("training", "Late again! @united http://t.co/x", "good"),
    ("training", "all fine", "good"),
    ("training", "@one http://x", "good"),
    ("training", "@two http://y", "good"),
    ("held out", "all fine", "good"),
    ("held out", "ALL fine...", "good"),
    ("held out", "quite new", "bad"),
]


def test_repeated_contradicting_and_leaked_rows_are_counted() -> None:
    health = data_health(table(ODD), labels=("bad", "good", "unused"))
    exact, near = health["exact_duplicates"], health["near_duplicates"]
    assert (exact["groups"], exact["rows"]) == (2, 4)
    assert (near["groups"], near["rows"]) == (2, 6)
    assert health["contradictions"]["groups"] == 1
    assert [row["row"] for row in health["contradictions"]["first"][0]] == [1, 2, 3]
    leaks = health["leaks"]
    assert [row["row"] for row in leaks["exact"]["first"]] == [7]
    assert [row["row"] for row in leaks["near"]["first"]] == [8]
    assert health["balance"]["good"] == {"training": 4, "held_out": 2}
    assert health["balance"]["unused"] == {"training": 0, "held_out": 0}
    assert health["tokens"]["held out"] | {"percentile_95": 0} == {
        "least": 17,
        "median": 18.0,
        "percentile_95": 0,
        "most": 19,
        "mean": 18.0,
        "total": 54,
    }
    assert health["suspected_training_labels"] is None  # too few rows of a label
    json.dumps(health)


def test_shortened_rows_are_named() -> None:
    rows = table(ODD)
    rows.loc[3, "shortened"] = True
    found = data_health(rows, labels=())["shortened"]
    assert (found["count"], found["rows"][0]["row"]) == (1, 4)


def test_free_text_has_no_balance() -> None:
    health = data_health(table(ODD), labels=())
    assert health["balance"] is None
    assert health["suspected_training_labels"] is None


def test_no_held_out_rows() -> None:
    health = data_health(table(ODD[:4]), labels=("bad", "good"))
    assert health["leaks"]["exact"]["rows"] == 0
    assert list(health["tokens"]) == ["training"]


def test_planted_training_label_error_comes_first() -> None:
    random = np.random.default_rng(0)
    words = {"bad": ["late", "lost", "rude"], "good": ["thanks", "great", "friendly"]}
    rows = [
        ("training", " ".join(random.choice(words[label], 4)) + f" n{n}", label)
        for n in range(60)
        for label in words
    ]
    rows[11] = ("training", rows[11][1], "bad")
    found = data_health(table(rows), labels=tuple(words))["suspected_training_labels"]
    assert found is not None
    assert found["examined"] == 120
    assert (found["first"][0]["row"], found["first"][0]["suggested"]) == (12, "good")
    assert found["count"] <= 3


@pytest.mark.parametrize("other", ["LATE again", "late, again!", "@x late again https://t.co/1"])
def test_texts_are_normalised(other: str) -> None:
    assert normalised(other) == normalised("late again")
    assert normalised(other) != normalised("late")


def test_texts_on_one_line() -> None:
    assert one_line("a\n b\t\x1b[31m\u202ec\x00") == "a b \\x1b[31m\\u202ec\\x00"
    assert one_line("नहीं 👩\u200d💻") == "नहीं 👩\u200d💻"
    assert one_line("x" * 10_000_000, limit=20) == "x" * 19 + "…"
    assert one_line("word " * 100, limit=20) == "word word word word…"
    assert one_line("exactly so", limit=10) == "exactly so"
