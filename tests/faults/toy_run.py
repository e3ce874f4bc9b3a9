"""A toy run that may be killed at any instant, and what it must end with.

As a script it is what `accelerate launch` starts: tests/faults/toy_run.py FOLDER VARIANT
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import TrainerCallback

from lora_fsdp import LoraTrainer
from lora_fsdp.ranks import from_every_rank
from lora_fsdp.training.saving.checkpoints import find_damage, list_checkpoints
from lora_fsdp.training.saving.training_state import take_random_state
from tests.support.runs import toy_trainer

# Five steps an epoch; saving and logging fall on different steps, and across the epochs' ends.
SHARED = {"rows": 40, "num_train_epochs": 3, "dropout": 0.3, "lr_scheduler_type": "linear"}
VARIANTS: dict[str, dict[str, Any]] = {
    "steps": {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 3,
        "eval_strategy": "epoch",
    },
    "best": {
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "logging_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    },
    "cut": {  # ends in the middle of an epoch, with workers that read ahead
        "max_steps": 13,
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "dataloader_num_workers": 1,
    },
}
RESULT = "result.json"
_OF_THE_CLOCK = ("runtime", "per_second", "flos", "eta_seconds")


class Slowly(TrainerCallback):
    """Leaves time to be killed in."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(0.02)


def run(folder: str, variant: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Start or resume the run; what it ended with, also in `result.json`."""
    torch.set_num_threads(1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    settings = SHARED | VARIANTS[variant] | {"per_device_train_batch_size": 8 // world_size}
    trainer = toy_trainer(folder, callbacks=[Slowly()], **settings | (options or {}))
    resume = any(not find_damage(path) for path in list_checkpoints(Path(folder)))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    result = ending(trainer)
    if trainer.is_world_process_zero():
        unfinished = Path(folder, RESULT + ".partial-file")
        unfinished.write_text(json.dumps(result))
        unfinished.rename(Path(folder, RESULT))
    return result


def ending(trainer: LoraTrainer) -> dict[str, Any]:
    """All that two equal runs have in common, to the bit."""
    history = [
        {k: v for k, v in entry.items() if not any(word in k for word in _OF_THE_CLOCK)}
        for entry in trainer.state.log_history
    ]
    random = json.dumps(take_random_state(trainer.args.device))
    return {
        "adapter": trainer.adapter.fingerprint(),
        "optimizer": _digest_optimizer(trainer),
        "scheduler": json.dumps(trainer.lr_scheduler.state_dict(), default=str),
        "random": from_every_rank(hashlib.sha256(random.encode()).hexdigest()),
        "history": history,
        "confusion": {
            str(step): m.to_numpy().tolist() for step, m in trainer.confusion_matrices.items()
        },
        "best": Path(trainer.state.best_model_checkpoint or "none").name,
        "steps": trainer.state.global_step,
    }


def _digest_optimizer(trainer: LoraTrainer) -> str:
    """Of the optimizer of a run that trained, or of the checkpoint that one was resumed from."""
    digest = hashlib.sha256()
    for index, state in sorted(trainer.optimizer.state_dict()["state"].items()):
        for name, value in sorted(state.items()):
            digest.update(f"{index}/{name}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    from lora_fsdp.scripts import configure_output

    configure_output()
    run(sys.argv[1], sys.argv[2])
