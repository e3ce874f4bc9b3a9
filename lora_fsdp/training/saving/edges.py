"""Where a run can be cut: between a step and the next, once all that belongs to it is done."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.errors import TrainingInterrupted
from lora_fsdp.training.watching.interruption import StopRequests

logger = logging.getLogger(__name__)


class CanBeCut(Protocol):
    """What is asked of a trainer whose run can be cut."""

    stop_requests: StopRequests
    steps_per_epoch: int
    stopped_by_callback: bool

    def restore_loop(self) -> None:
        """Continue the loop's own counters."""


class AtTheEdges(TrainerCallback):
    """Restores the loop, saves at the right moment, and stops the run when that was asked for.

    The last step of an epoch is followed by what happens once an epoch (evaluation, logging). Its
    checkpoint is saved after that: one saved before would, when resumed, leave it out.
    """

    def __init__(self, trainer: CanBeCut) -> None:
        self.trainer = trainer
        self.save_after_epoch = False
        self.stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the loop's own counters."""
        self.trainer.restore_loop()
        self.trainer.stop_requests.begin(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save if the ranks stop after this step; put saving off to the end of an epoch."""
        self.stopping = self.trainer.stop_requests.is_last(state.global_step)
        control.should_save = control.should_save or self.stopping
        # Early stopping decides later, when metrics are there. A run that it has ended is over, one
        # that a callback cut off here may go on when it is resumed.
        self.trainer.stopped_by_callback = control.should_training_stop
        ends_epoch = state.global_step % self.trainer.steps_per_epoch == 0
        if control.should_save and (ends_epoch or control.should_training_stop):
            control.should_save, self.save_after_epoch = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what was put off."""
        control.should_save = control.should_save or self.save_after_epoch
        self.save_after_epoch = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop here if that was asked for.

        Raises:
            TrainingInterrupted: the checkpoint is whole.
        """
        if not self.stopping:
            return
        message = (
            f"Training stopped after step {state.global_step} of {state.max_steps} "
            f"({self.trainer.stop_requests.reason}), with a checkpoint. Continue with "
            "--resume_from_checkpoint true."
        )
        logger.warning("%s", message)
        raise TrainingInterrupted(message)
