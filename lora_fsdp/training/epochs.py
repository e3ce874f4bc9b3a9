"""The order of examples, drawn anew where an epoch begins."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ShuffleEachEpoch(TrainerCallback):
    """Gives the training steps their epoch, also when a run resumes in the middle of one.

    The Trainer tells a data loader its epoch, but not where it skips steps that were made before.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shuffle for the epoch that begins."""
        loader = kwargs["train_dataloader"]
        loader.dataset.set_epoch(state.global_step // len(loader))
