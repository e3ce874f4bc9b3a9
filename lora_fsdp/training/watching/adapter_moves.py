"""Whether training moves the adapters at all."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.adapter.adapter_set import AdapterSet


class AdapterMoves(TrainerCallback):
    """Stops a run whose adapters do not move in the first step that has a learning rate.

    Attributes:
        checked: whether there has been such a step.
        moved: whether the live adapters have had one. The first step of a warm-up has none, and an
            adapter that is loaded may have been saved after it: whoever loads one says so here.
    """

    def __init__(self, adapters: AdapterSet) -> None:
        self.adapters = adapters
        self.checked = False
        self.moved = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check once."""
        group = kwargs["optimizer"].param_groups[0]
        # Schedule-free optimizers say here what they made of it: RAdam begins with steps of 0.
        if group.get("scheduled_lr", group["lr"]) > 0:
            if not self.checked:
                self.adapters.check_moved()
                self.checked = True
            self.moved = True
