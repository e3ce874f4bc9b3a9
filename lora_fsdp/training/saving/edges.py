"""Where a run can be cut: between a step and the next, once all that belongs to it is done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.errors import TrainingInterrupted
from lora_fsdp.training.watching.interruption import StopRequests

logger = logging.getLogger(__name__)


class AtTheEdges(TrainerCallback):
    """Restores the loop, saves at the right moment, and stops the run when that was asked for.

    The Trainer tells a data loader its epoch, but not where a resumed run skips steps: it is told
    here. The last step of an epoch is followed by what happens once an epoch (evaluation, logging).
    Its checkpoint is saved after that: one saved before would, when resumed, leave it out.

    Args:
        args: the run's.
        restore_loop: continues what the Trainer starts anew at every training.

    Attributes:
        stopped_by_callback: a callback stops the run for a reason that is not in its metrics.
    """

    def __init__(self, args: FineTuningArguments, *, restore_loop: Callable[[], None]) -> None:
        self.args = args
        self.restore_loop = restore_loop
        self.begin()

    def begin(self) -> None:
        """Forget an earlier training. A collective call."""
        self.stopped_by_callback = False
        self._save_after_epoch = False
        self._stopping = False
        self._requests = StopRequests(
            rank=self.args.process_index,
            world_size=self.args.world_size,
            max_hours=self.args.max_hours,
        )

    def watching(self) -> AbstractContextManager[None]:
        """Listen for requests to stop, until the block ends."""
        return self._requests.watching()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the loop's own counters."""
        self.restore_loop()
        self._requests.begin(state.global_step + 1)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the epoch's order of examples."""
        loader = kwargs["train_dataloader"]
        loader.dataset.set_epoch(state.global_step // len(loader))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save if the ranks stop after this step; put saving off to the end of an epoch."""
        self._stopping = self._requests.is_last(state.global_step)
        control.should_save = control.should_save or self._stopping
        # Early stopping decides later, when metrics are there. A run that it has ended is over, one
        # that a callback cut off here may go on when it is resumed.
        self.stopped_by_callback = control.should_training_stop
        ends_epoch = state.global_step % len(kwargs["train_dataloader"]) == 0
        if control.should_save and (ends_epoch or control.should_training_stop):
            control.should_save, self._save_after_epoch = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what was put off."""
        control.should_save = control.should_save or self._save_after_epoch
        self._save_after_epoch = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop here if that was asked for.

        Raises:
            TrainingInterrupted: the checkpoint is whole.
        """
        if not self._stopping:
            return
        message = (
            f"Training stopped after step {state.global_step} of {state.max_steps} "
            f"({self._requests.reason}), with a checkpoint. Continue with "
            "--resume_from_checkpoint true."
        )
        logger.warning("%s", message)
        raise TrainingInterrupted(message)
