"""The plain outputs of a run. Run: python -m pytest tests/evaluation/test_report.py"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lora_fsdp.evaluation.outputs import (
    PredictionRow,
    format_metrics_table,
    format_predictions_table,
    save_confusion_matrix_png,
    write_json,
)


@pytest.mark.parametrize("labels", [["a", "b"], [f"label number {n}" for n in range(12)] + ["$x_"]])
def test_confusion_matrix_is_a_picture(tmp_path: Path, labels: list[str]) -> None:
    counts = np.arange(len(labels) * (len(labels) + 1)).reshape(len(labels), -1)
    matrix = pd.DataFrame(counts, index=labels, columns=[*labels, "(none)"])
    matrix.iloc[0] = 0  # a label that no row has
    save_confusion_matrix_png(matrix, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_table() -> None:
    columns = {"majority": {"accuracy": 0.25}, "[tuned]": {"accuracy": 0.75, "macro_f1": 1 / 3}}
    lines = format_metrics_table(columns, ["accuracy", "macro_f1"]).splitlines()
    assert lines[0].split() == ["metric", "majority", "[tuned]"]
    assert lines[2].split() == ["accuracy", "0.2500", "0.7500"]
    assert lines[3].split() == ["macro_f1", "—", "0.3333"]


def row(text: str) -> PredictionRow:
    return PredictionRow(
        row=12, text=text, target="happiness", base=None, tuned="joy", probability=0.5
    )


def test_predictions_table_shortens_only_the_text() -> None:
    lines = format_predictions_table([row("word " * 100)], width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 3
    assert lines[0].split() == ["row", "text", "true", "base", "tuned", "prob."]
    assert lines[2].split()[0] == "12"
    assert lines[2].split()[-4:] == ["happiness", "—", "joy", "0.5000"]
    assert "…" in lines[2]


def test_predictions_table_shows_text_as_it_is_on_one_line() -> None:
    output = format_predictions_table([row("a\nb\t[red]c[/red] \x1b[31m :smile:")], width=100)
    assert "a\\nb\\t[red]c[/red] \\x1b[31m :smile:" in output
    assert len(output.splitlines()) == 3


def test_tables_are_plain_whatever_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = format_predictions_table([row("text")], width=90)
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "40", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    assert format_predictions_table([row("text")], width=90) == plain
    assert "\x1b" not in plain


def test_write_json_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"old": 1})
    write_json(path, {"é": np.float32(0.5), "rows": np.int64(3), "path": Path("a")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 0.5, "rows": 3, "path": "a"}
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_write_json_leaves_the_file_when_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError, match=r"set .* cannot be written as JSON"):
        write_json(path, {"new": {1, 2}})

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["metrics.json"]
