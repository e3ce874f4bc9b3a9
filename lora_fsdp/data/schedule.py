"""How many optimizer steps a run has, and which examples each of them sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a run, as the Trainer counts them.

    An epoch's last step may have fewer examples than the others.

    Attributes:
        rows: examples of an epoch.
        examples_per_step: of an optimizer step, over all ranks.
        steps: of the complete run.
    """

    rows: int
    examples_per_step: int
    steps: int

    @classmethod
    def of(cls, training: Mapping[str, Any], *, rows: int, ranks: int) -> Schedule:
        """The schedule of a run.

        Args:
            training: values of `FineTuningArguments` by name.
            rows: to train on.
            ranks: that share a step.
        """
        per_step = ranks * examples_per_rank(training)
        per_epoch = -(-rows // per_step)
        asked = int(training["max_steps"])
        steps = asked if asked > 0 else math.ceil(training["num_train_epochs"] * per_epoch)
        return cls(rows, per_step, steps)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.rows // self.examples_per_step)

    @property
    def epochs(self) -> float:
        """How often the rows are seen."""
        return self.steps / max(1, self.steps_per_epoch)

    @property
    def examples(self) -> int:
        """Of the complete run."""
        return self.examples_before(self.steps)

    def evaluations(self, training: Mapping[str, Any]) -> int:
        """How often the held-out rows are evaluated while training.

        Args:
            training: values of `FineTuningArguments` by name, as given or as settled.
        """
        strategy = training.get("eval_strategy", "no")
        if strategy == "no" and training.get("early_stopping_patience") is not None:
            strategy = "epoch"  # as the arguments settle it
        if strategy == "epoch":
            return math.ceil(self.epochs)
        if strategy != "steps":
            return 0
        every = training["eval_steps"] or training["logging_steps"]
        steps = math.ceil(every * self.steps) if every < 1 else int(every)  # a share of all steps
        return math.ceil(self.steps / max(1, steps))  # the last step is one of them

    def examples_before(self, step: int) -> int:
        """Examples of the first `step` optimizer steps."""
        epochs, rest = divmod(step, max(1, self.steps_per_epoch))
        return epochs * self.rows + min(rest * self.examples_per_step, self.rows)


def examples_per_rank(training: Mapping[str, Any]) -> int:
    """Of an optimizer step on one rank: packed sequences make accumulation needless."""
    return int(training["per_device_train_batch_size"] * training["gradient_accumulation_steps"])
