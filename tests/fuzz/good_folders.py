"""Good folders to damage: a base, the adapter of a run on it, and a plain PEFT adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_fsdp.evaluation.calibration import fit_calibration
from lora_fsdp.training.calibrating import save_calibration
from tests.support.adapters import edit_json, save_base, save_plain_adapter
from tests.support.runs import toy_trainer
from tests.support.tiny import LABELS


def make_good_folders(folder: Path) -> None:
    """Write them into `folder`."""
    save_base(folder / "base", max_shard_size="120KB")
    trainer = toy_trainer(folder / "run", rows=8, num_train_epochs=1, base=folder / "base")
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    scores = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    fitted = fit_calibration(scores, np.arange(60) % 3, labels=LABELS, apart=True)
    assert fitted is not None
    save_calibration(fitted[0], folder / "adapter")
    edit_json(folder / "adapter" / "task.json", task="classification")
    save_plain_adapter(folder / "plain", folder / "base")
