"""What pages tell users to import is public, and importing the library alone is light.

Run: python -m pytest tests/test_public_names.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import lora_fsdp
from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    ModelArguments,
    Predictor,
    evaluate,
    finetune,
    load_table,
)
from lora_fsdp.errors import DataError
from tests.support.tiny import toy_table
from tests.test_documentation import PAGES, ROOT, blocks, name_of


def imported_by_pages() -> Iterator[tuple[str, str, str]]:
    """Page, module and name of every import of this library."""
    for page in PAGES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Import):
                    named = [alias.name for alias in node.names]
                    yield from ((name_of(page), name, "") for name in named if "lora_fsdp" in name)
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lora_fsdp"):
                    for alias in node.names:
                        yield name_of(page), str(node.module), alias.name


def test_pages_import_public_names_only() -> None:
    found = list(imported_by_pages())
    assert {"Predictor", "evaluate", "load_table"} <= {
        name for page, _, name in found if page == "README.md"
    }
    private = [
        one for one in found if one[1] != "lora_fsdp" or one[2] not in (*lora_fsdp.__all__, "")
    ]
    assert not private


@pytest.mark.parametrize("name", lora_fsdp.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(lora_fsdp, name) is not None
    assert name in dir(lora_fsdp)


def test_public_names_are_sorted_and_known_to_type_checkers() -> None:
    assert lora_fsdp.__all__ == sorted(set(lora_fsdp.__all__))
    tree = ast.parse((ROOT / "lora_fsdp" / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    named = [
        alias.asname or alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(named) == lora_fsdp.__all__


def test_importing_the_library_loads_nothing_heavy() -> None:
    code = "import sys, lora_fsdp; print(sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(done.stdout))
    assert loaded.isdisjoint({"torch", "transformers", "pandas", "peft", "datasets", "numpy"})


def test_the_first_pages_lines(model_folder: Path, tmp_path: Path) -> None:
    """A table answered and measured from Python; `answers` is what `columns` says, row by row."""
    rows = toy_table(24)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    run = tmp_path / "run"
    finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(),
        data_args=DataArguments(
            task="classification",
            data_file=str(tmp_path / "rows.csv"),
            task_options={
                "text_column": "text", "label_column": "label", "instruction": "Say how:"
            },
            eval_size=0.25,
        ),
        training_args=FineTuningArguments(output_dir=str(run), max_steps=2, use_cpu=True),
    )  # fmt: skip
    predictor = Predictor.from_adapter(run)
    table = load_table(tmp_path / "rows.csv")
    answers = predictor.answers(table)
    assert isinstance(answers, pd.DataFrame)
    assert list(answers.columns[: len(table.columns)]) == list(table.columns)
    assert set(answers["predicted_label"]) <= set(predictor.task.labels)
    assert "predicted_label" not in table  # a copy

    measured = evaluate(run, table)
    right = answers["predicted_label"] == table["label"]
    assert measured.metrics["accuracy"] == pytest.approx(right.mean())
    assert measured.rows == len(table)
    assert measured.rows_trained_on == 18
    assert measured.confusion_matrix is not None
    assert int(measured.confusion_matrix.to_numpy().trace()) == right.sum()

    table.loc[3, "text"] = ""
    with pytest.raises(DataError, match="3"):
        evaluate(run, table)
    assert evaluate(run, table, on_bad_rows="drop").rows_left_out == 1
