"""A toy run whose processes keep a ledger of the rows they train on.

What torchrun starts: -m tests.support.elastic_run OUTPUT LEDGER SECONDS_A_STEP
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lora_fsdp import LoraTrainer
from lora_fsdp.ranks import from_every_rank
from lora_fsdp.scripts import configure_output
from tests.support.runs import toy_trainer

EXAMPLES_PER_STEP = 8
ROWS = 40
EPOCHS = 2


def main(output: str, ledger: str, seconds: str) -> None:
    """Train; each step of each process is a line in the ledger before it is made."""
    configure_output()
    file = Path(ledger) / f"{os.environ['RANK']}-{os.getpid()}.jsonl"
    attempt: list[int] = []
    step_of_trainer = LoraTrainer.training_step

    def with_ledger(self: LoraTrainer, model: Any, inputs: Any, *others: Any) -> Any:
        line = {
            "attempt": attempt[0],
            "step": self.state.global_step,
            "rows": inputs.example_rows,
            "ranks": int(self.args.world_size),
        }
        with file.open("a") as opened:
            opened.write(json.dumps(line) + "\n")
        time.sleep(float(seconds))
        return step_of_trainer(self, model, inputs, *others)

    LoraTrainer.training_step = with_ledger  # type: ignore[method-assign]
    trainer = toy_trainer(
        output,
        rows=ROWS,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=2,
        examples_per_step=EXAMPLES_PER_STEP,
        save_strategy="steps",
        save_steps=2,
        resume_from_checkpoint="if_any",
        stall_seconds=10,
    )
    # The same number on every rank of an attempt, and a larger one in every later attempt: the
    # hosts of a test have one kernel, and so one clock.
    attempt.append(from_every_rank(time.monotonic_ns())[0])
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    if int(os.environ["RANK"]) == 0:
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        (Path(output) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
