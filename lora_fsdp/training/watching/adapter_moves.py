"""Whether training moves the adapter at all."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.adapter.adapter_set import AdapterSet


class CheckAdapterMoves(TrainerCallback):
    """Stops a run whose adapter does not move in the first step that has a learning rate.

    Attributes:
        moved: whether the live adapter has had such a step. The first step of a warm-up has none,
            and an adapter that is loaded may have been saved after it.
    """

    def __init__(self, adapter: AdapterSet) -> None:
        self.adapter = adapter
        self.done = False
        self.moved = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check once."""
        if kwargs["optimizer"].param_groups[0]["lr"] > 0:
            if not self.done:
                self.adapter.check_moved()
                self.done = True
            self.moved = True
