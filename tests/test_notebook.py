"""The notebook, top to bottom. Run: python -m pytest tests/test_notebook.py"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from lora_fsdp.errors import ArgumentError, LaunchError
from lora_fsdp.notebook import Report, launch
from tests.support.checkout import make_checkout
from tests.support.tiny import toy_table
from tests.test_default import needs_model, needs_table

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
CELL_SECONDS = 500


def text_of(cell: Any) -> str:
    """What a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(cell: Any, kind: str) -> str:
    """What a cell's last value is shown as."""
    [result] = [output for output in cell.outputs if output.output_type == "execute_result"]
    return result.data[kind]


def test_it_is_committed_without_outputs() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.slow
@pytest.mark.distributed
def test_it_runs_top_to_bottom_on_toys(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same cells, with a toy behind the model's name and a small table behind the tweets'."""
    make_checkout(tmp_path, model_folder)
    run_notebook(tmp_path, monkeypatch, steps=8)


@needs_model
@needs_table
@pytest.mark.slow
@pytest.mark.distributed
def test_it_runs_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that looks like the project's, so that no run of the user's is touched."""
    for name in (".cache", "accelerate_configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    run_notebook(tmp_path, monkeypatch, steps=16)


def run_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch, *, steps: int) -> None:
    """Opened in a folder below the project's; the run takes so many optimizer steps."""
    opened = folder / "opened"
    opened.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    book = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        book, timeout=CELL_SECONDS, resources={"metadata": {"path": str(opened)}}
    )
    client.execute()
    _, trained, report, metrics, answers, predicted = [
        cell for cell in book.cells if cell.cell_type == "code"
    ]
    progress = text_of(trained)
    assert "FSDP status: 2 process(es)" in progress
    assert "sharded by FSDP2" in progress
    assert f"step {steps}/{steps}" in progress
    assert "<iframe" in shown(report, "text/html")
    assert "macro_f1" in shown(metrics, "text/plain")
    assert "base" in shown(answers, "text/plain")
    assert "predicted_label" in shown(predicted, "text/plain")
    assert (folder / "runs" / "notebook" / "README.md").is_file()


def options(tmp_path: Path, model_folder: Path) -> dict[str, object]:
    table = tmp_path / "table.csv"
    toy_table(24).to_csv(table, index=False)
    return {
        "model_name_or_path": model_folder,
        "task": "classification",
        "data_file": table,
        "text_column": "text",
        "label_column": "label",
        "lora_target_modules": ["q_proj", "v_proj"],
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "save_strategy": "no",
        "eval_size": 6,
        "max_length": 128,
        "overwrite_output_dir": True,
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mistake_of_a_process_is_the_error_of_the_cell(
    tmp_path: Path, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = options(tmp_path, model_folder) | {"text_column": "txet"}
    with pytest.raises(LaunchError, match=r"code 2: ColumnNotFoundError: .*'text'"):
        launch(wrong, num_processes=2)
    assert "ColumnNotFoundError" in capfd.readouterr().out


def test_without_a_folder_nothing_is_started() -> None:
    with pytest.raises(ArgumentError, match="output_dir"):
        launch({"task": "sentiment"})


def test_a_report_cannot_leave_its_frame(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text('<p title="x">"></iframe>&lt;</p>', encoding="utf-8")
    shown = Report(tmp_path)._repr_html_()
    assert shown.count("</iframe>") == 1
    assert 'sandbox=""' in shown
    assert "&amp;lt;" in shown
