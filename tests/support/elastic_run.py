"""A toy run whose processes keep a ledger of the rows they train on.

What torchrun starts: -m tests.support.elastic_run OUTPUT LEDGER SECONDS_A_STEP
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_fsdp import LoraTrainer
from lora_fsdp.distributed.lost_hosts import watching_hosts
from lora_fsdp.ranks import from_every_rank
from lora_fsdp.scripts import configure_output
from tests.support.runs import toy_trainer

RESULT = "result.json"


@dataclass(frozen=True)
class Sizes:
    """Of a run.

    Attributes:
        rows, epochs: of training.
        examples: of a step, on any number of ranks.
        save_steps: between checkpoints.
        stall_seconds: after which a rank that makes no progress ends the attempt.
    """

    rows: int = 40
    epochs: int = 2
    examples: int = 8
    save_steps: int = 2
    stall_seconds: float = 10.0

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.epochs * self.rows // self.examples


SIZES = Sizes()


def elastic_trainer(output: str, sizes: Sizes, **changes: Any) -> LoraTrainer:
    """The run's trainer, on any number of ranks."""
    return toy_trainer(
        output,
        **{
            "rows": sizes.rows,
            "num_train_epochs": sizes.epochs,
            "per_device_train_batch_size": 2,
            "examples_per_step": sizes.examples,
            "save_strategy": "steps",
            "save_steps": sizes.save_steps,
            "resume_from_checkpoint": "if_any",
            "stall_seconds": sizes.stall_seconds,
            **changes,
        },
    )


class Ranks(TrainerCallback):
    """Keeps with each step's log on how many ranks it was made; checkpoints hold the log."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add it."""
        state.log_history[-1]["ranks"] = int(args.world_size)


def train(
    output: str, ledger: str, seconds: float, sizes: Sizes = SIZES, **changes: Any
) -> LoraTrainer:
    """Train; each step of each process is a line in the ledger before it is made."""
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
        time.sleep(seconds)
        return step_of_trainer(self, model, inputs, *others)

    LoraTrainer.training_step = with_ledger  # type: ignore[method-assign]
    with watching_hosts():
        return _train(output, sizes, attempt, **changes)


def _train(output: str, sizes: Sizes, attempt: list[int], **changes: Any) -> LoraTrainer:
    trainer = elastic_trainer(output, sizes, callbacks=[Ranks()], **changes)
    # The same number on every rank of an attempt, and a larger one in every later attempt: the
    # hosts of a test have one kernel, and so one clock.
    attempt.append(from_every_rank(time.monotonic_ns())[0])
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    if int(os.environ["RANK"]) == 0:
        (Path(output) / RESULT).write_text(json.dumps(result_of(trainer)))
    return trainer


def result_of(trainer: LoraTrainer) -> dict[str, Any]:
    """What a run ends with: losses, ranks of each step, and what the adapter is recognised by."""
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "losses": [line["loss"] for line in logged],
        "ranks": [line.get("ranks") for line in logged],
        "adapter": trainer.adapter.fingerprint(),
    }


def lines_of(ledger: Path) -> list[dict[str, Any]]:
    """All that the ledger holds so far; a line that is being written is left out."""
    found = []
    for file in ledger.iterdir():
        found += [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    return found


def check_ledger(lines: list[dict[str, Any]], sizes: Sizes = SIZES) -> None:
    """Check what the steps that count saw: of each, its last attempt.

    Raises:
        AssertionError: a row was lost or seen twice in an epoch.
    """
    by_step: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for line in lines:
        by_step.setdefault(line["step"], {}).setdefault(line["attempt"], []).append(line)
    assert sorted(by_step) == list(range(sizes.steps))
    per_epoch = sizes.steps // sizes.epochs
    for epoch in range(sizes.epochs):
        seen: Counter[int] = Counter()
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            ranks = by_step[step][max(by_step[step])]
            assert len(ranks) == ranks[0]["ranks"]
            rows = [row for line in ranks for row in line["rows"]]
            assert len(rows) == sizes.examples  # however many ranks shared them
            seen.update(rows)
        assert set(seen.values()) == {1}
        assert len(seen) == sizes.rows


if __name__ == "__main__":
    configure_output()
    train(sys.argv[1], sys.argv[2], float(sys.argv[3]))
