"""Toy runs of several adapters through the front door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    ModelArguments,
    finetune,
)
from lora_fsdp.pipeline import FineTuningResult
from tests.support.adapters import save_base
from tests.support.tiny import LABELS, toy_table

OPTIONS: dict[str, Any] = {
    "task": "classification",
    "text_column": "text",
    "label_column": "label",
    "instruction": "Say how it sounds:",
    "labels": list(LABELS),
    "eval_size": 12,
    "max_length": 128,
}
_OF_THE_ADAPTER = ("lora_dropout", "lora_r", "lora_kwargs")


def prepared(folder: Path, rows: int = 60) -> tuple[str, str]:
    """A toy base and a table, in `folder`."""
    table = folder / "table.csv"
    if not table.exists():
        folder.mkdir(parents=True, exist_ok=True)
        toy_table(rows).to_csv(table, index=False)
        save_base(folder / "base")
    return str(folder / "base"), str(table)


def toy_sweep(
    folder: Path,
    output: str = "run",
    data: dict[str, Any] | None = None,
    rows: int = 60,
    **settings: Any,
) -> FineTuningResult:
    """`finetune` with the arguments of a short toy run and these."""
    base, table = prepared(folder, rows)
    lora = {name: settings.pop(name) for name in _OF_THE_ADAPTER if name in settings}
    defaults: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        "max_tokens_per_row": 256,
    }
    return finetune(
        model_args=ModelArguments(base),
        lora_args=LoraArguments(**{"lora_r": 4, **lora}),
        data_args=DataArguments(data_file=table, **OPTIONS | (data or {})),
        training_args=FineTuningArguments(
            output_dir=str(folder / output), **{**defaults, **settings}
        ),
    )
