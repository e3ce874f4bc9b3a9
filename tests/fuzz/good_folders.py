"""Good folders to damage: a base, the adapter of a run on it, and a plain PEFT adapter."""

from __future__ import annotations

from pathlib import Path

from tests.support.adapters import edit_json, save_base, save_plain_adapter
from tests.support.runs import toy_trainer


def make_good_folders(folder: Path) -> None:
    """Write them into `folder`."""
    save_base(folder / "base", max_shard_size="120KB")
    trainer = toy_trainer(folder / "run", rows=8, num_train_epochs=1, base=folder / "base")
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    edit_json(folder / "adapter" / "task.json", task="classification")
    save_plain_adapter(folder / "plain", folder / "base")
