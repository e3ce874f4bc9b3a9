"""The search with Optuna in examples/. Run: python -m pytest tests/sweeps/test_optuna.py"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lora_fsdp import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from tests.support.adapters import save_base
from tests.support.tiny import toy_table

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "optuna_search.py"


def test_a_search_of_two_trials(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="pip install optuna to test it")
    spec = importlib.util.spec_from_file_location("optuna_search", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    toy_table(36).to_csv(tmp_path / "table.csv", index=False)
    toy_table(12, seed=5).to_csv(tmp_path / "test.csv", index=False)
    study, on_test_rows = example.search(
        {
            "model_args": ModelArguments(str(save_base(tmp_path / "base"))),
            "lora_args": LoraArguments(),
            "data_args": DataArguments(
                task="classification",
                data_file=str(tmp_path / "table.csv"),
                test_file=str(tmp_path / "test.csv"),
                eval_size=12,
                max_length=128,
            ),
            "training_args": FineTuningArguments(
                output_dir=str(tmp_path / "search"),
                max_steps=2,
                save_strategy="no",
                disable_tqdm=True,
            ),
        },
        trials=2,
    )
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert study.trials[0].params != study.trials[1].params
    assert 0 <= on_test_rows <= 1
    for trial in study.trials:
        assert (tmp_path / "search" / f"trial-{trial.number}" / "report.html").is_file()
