"""Is it worth it: one verdict, with its uncertainty, wherever it is said.

Run: python -m pytest tests/evaluation/test_verdict.py
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lora_fsdp.evaluation.comparison import Comparison
from lora_fsdp.evaluation.outputs import TUNED, UNTRAINED
from lora_fsdp.reporting import write_report
from lora_fsdp.reporting.model_card import write_model_card
from lora_fsdp.tasks.answers.kind import MAJORITY, TFIDF
from tests.support.reported import made_up_run


def compared(right: Mapping[str, Sequence[bool]], *, metric: str = "accuracy") -> Comparison:
    """Systems that are right on these rows, by accuracy."""
    rows = len(right[TUNED])
    answers = {name: ["yes" if hit else "no" for hit in hits] for name, hits in right.items()}
    columns = {"base" if name == UNTRAINED else name: given for name, given in answers.items()}
    for baseline in (MAJORITY, TFIDF):
        if baseline in columns:
            columns[f"baseline/{baseline}"] = columns.pop(baseline)
    table: dict[str, Any] = {"row": range(1, rows + 1), "text": ["x"] * rows, "probability": 0.5}
    return Comparison(
        {name: {metric: float(np.mean(hits))} for name, hits in right.items()},
        metric,
        pd.DataFrame({**table, "target": ["yes"] * rows, **columns}),
        None,
        (),
        {},
    )


def hits(right: int, rows: int, *, first: int = 0) -> list[bool]:
    """`right` rows of `rows`, from row `first` on."""
    return [(place - first) % rows < right for place in range(rows)]


def test_a_lead_of_one_row_is_not_proven() -> None:
    """301 against 300 of 400 rows, and not the same ones."""
    said = compared({UNTRAINED: hits(300, 400, first=90), TUNED: hits(301, 400)}).verdict()
    assert said.startswith("Not proven: the lead over the untrained model may be chance.")
    assert "Accuracy 0.752 against 0.750 on 400 held-out rows: +0.002" in said
    assert "interval \u22120." in said


def test_a_clear_lead_is_worth_it() -> None:
    said = compared({UNTRAINED: hits(100, 400), TUNED: hits(300, 400)}).verdict()
    assert said.startswith("Worth it: the tuned model beats the untrained model.")


def test_few_rows_are_said_to_be_few() -> None:
    said = compared({UNTRAINED: hits(1, 12), TUNED: hits(12, 12)}).verdict()
    assert said.startswith("Too few held-out rows to tell: 12.")


def test_no_answer_is_the_same_in_memory_and_in_the_file(tmp_path: Path) -> None:
    found = compared({UNTRAINED: hits(100, 400), TUNED: hits(300, 400)})
    found.predictions.loc[found.predictions["base"] == "no", "base"] = None
    found.save(tmp_path)
    page = html.unescape(write_report(tmp_path).read_text(encoding="utf-8"))
    assert found.verdict().split(". ")[0] in page
    assert found.verdict().split(". ", 1)[1] in page


@pytest.mark.parametrize("skill", [4.0, 0.3, 0.0, -4.0])
def test_terminal_report_and_card_say_the_same(tmp_path: Path, skill: float) -> None:
    run = made_up_run(tmp_path / "run", skill=skill, held_out=200)
    metrics = json.loads((run / "metrics.json").read_text())
    terminal = Comparison(
        metrics["metrics"],
        metrics["primary_metric"],
        pd.read_csv(run / "predictions.csv", keep_default_na=False),
        None,
        (),
        {},
    ).verdict()
    page = write_report(run)
    verdict = json.loads(page.with_suffix(".json").read_text())["scores"]["verdict"]
    assert terminal == f"{verdict['headline']} {verdict['detail']}"
    assert f">{html.escape(verdict['headline'])}</h1>" in page.read_text(encoding="utf-8")
    adapter = {
        "base_model_name_or_path": "tiny",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
    }
    (run / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    card = write_model_card(run)
    assert card is not None
    assert terminal in card.read_text(encoding="utf-8").replace("\\:", ":")
