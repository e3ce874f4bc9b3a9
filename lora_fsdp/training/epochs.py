"""The order of examples, drawn anew where an epoch begins."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.data.sampling import TrainingSteps


class ShuffleEachEpoch(TrainerCallback):
    """Gives the training steps their epoch, also when a run resumes in the middle of one."""

    def __init__(self, steps: TrainingSteps) -> None:
        self.steps = steps

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shuffle for the epoch that begins."""
        self.steps.set_epoch(state.global_step // len(self.steps))
