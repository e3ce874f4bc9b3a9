"""What watches a run: what goes wrong is said while it does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.distributed.drift import check_no_drift
from lora_fsdp.training.watching.adapter_moves import AdapterMoves
from lora_fsdp.training.watching.diverged_step import diverged
from lora_fsdp.training.watching.finiteness import FiniteSteps
from lora_fsdp.training.watching.heartbeat import Heartbeat
from lora_fsdp.training.watching.log_warnings import WarnFlatLoss, WarnSlowdown


@dataclass(eq=False, kw_only=True)
class Watchdogs(TrainerCallback):
    """Steps that are not finite, ranks that drift apart or stall; as a callback, where a step is.

    What may wait for the device is asked for where the host waits anyway: at the log, and before a
    checkpoint.

    Attributes:
        args: the run's.
        model: with its adapters, to save them where a step was not finite.
        adapters: watched.
        moves: whether training has moved them.
        shares_of_step: each rank's examples of an optimizer step, counted from 0.
        tokenizer: to write them as text.
        warnings: callbacks that warn of a flat loss and of a slowdown.
    """

    args: FineTuningArguments
    model: PeftModel
    adapters: AdapterSet
    moves: AdapterMoves
    shares_of_step: Callable[[int], list[list[EncodedExample]]]
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self.warnings = (WarnFlatLoss(self.args.flat_loss_steps), WarnSlowdown())
        self.begin()

    def begin(self) -> None:
        """Forget an earlier training. A collective call."""
        self._finite = FiniteSteps(self.adapters, self.args.device)
        # After which step the ranks were last found equal.
        self._last_equal: int | None = None
        self._heartbeat = Heartbeat(
            rank=self.args.process_index,
            world_size=self.args.world_size,
            stall_seconds=self.args.stall_seconds,
            run_folder=Path(str(self.args.output_dir)),
        )

    def watching(self) -> AbstractContextManager[None]:
        """Watch for ranks that stall, until the block ends."""
        return self._heartbeat.watching()

    def away(self, doing: str) -> AbstractContextManager[None]:
        """Leave out what may rightly take long."""
        return self._heartbeat.away(doing)

    # ---- in a step ------------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step's sequences are there."""
        self._heartbeat.beat(state.global_step + 1, "forward and backward")

    def before_sum(self, loss: torch.Tensor, *, step: int) -> None:
        """Look at this rank's loss and gradient, before they are summed over ranks."""
        self._finite.see_rank(loss)
        self._heartbeat.beat(step, "summing gradients over ranks")

    def before_optimizer(self, norm: torch.Tensor, *, step: int) -> None:
        """Look at the norm of the summed gradient."""
        self._finite.see_sum(norm, step=step)
        if not self.moves.checked:  # it would take an adapter that is held still for a stuck one
            self.check_finite()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step is made."""
        self._heartbeat.armed()
        self._heartbeat.beat(state.global_step, "done; the next one's data or a callback")

    # ---- where the host waits anyway ------------------------------------------------------------

    def hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Have `optimizer`, if it can, do nothing once a step was not finite."""
        # The Trainer wraps it; at a second training it already is.
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        self._finite.hold(inner)

    def check_finite(self) -> None:
        """Stop if a step was not finite. Waits for the device; a collective call.

        Raises:
            NonFiniteError: names step, ranks and rows; the batch is saved.
        """
        bad = self._finite.first_bad_step()
        if bad is None:
            return
        raise diverged(
            bad,
            shares=self.shares_of_step(bad.step - 1),
            model=self.model,
            tokenizer=self.tokenizer,
            run_folder=Path(str(self.args.output_dir)),
            adapter_held=self._finite.holds_optimizer,
        )

    def at_log(self, *, step: int) -> None:
        """Stop if a step was not finite, or if the ranks have drifted apart. A collective call.

        Raises:
            WatchdogError: one of the two.
        """
        self.check_finite()
        every = self.args.drift_check_steps
        if every and step - (self._last_equal or 0) >= every:
            check_no_drift(self.adapters, step=step, last_equal=self._last_equal)
            self._last_equal = step
