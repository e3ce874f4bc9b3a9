"""What a run is warned of from its log: a loss that does not move, a speed that collapses."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise, takewhile
from statistics import fmean, median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_LEAST_LOGS = 8
_SLOW_LOGS = 3
SLOW_SECONDS = 60.0


class WarnFlatLoss(TrainerCallback):
    """Warns once when the loss has not fallen below where it began, and does not move.

    A window's two halves are compared, and its later half with the run's first: not moved means
    within two standard errors of the difference, or within a ten-thousandth. A run whose loss has
    fallen and stays there is not flat in this sense.

    Args:
        steps: the window, in optimizer steps with a learning rate above 0; 0 = off.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.warned = steps == 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the log, which a resumed run brings along."""
        if self.warned or "loss" not in state.log_history[-1]:
            return
        logs = [log for log in state.log_history if log.get("learning_rate", 0) > 0]
        first = logs[0]["step"] if logs else state.global_step
        end = state.global_step
        if len(logs) < _LEAST_LOGS or end - first < self.steps - args.logging_steps:
            return
        in_window = takewhile(lambda log: log["step"] > end - self.steps, reversed(logs))
        recent = [log["loss"] for log in in_window]
        half = len(recent) // 2
        late, early = recent[:half], recent[half:]
        begin = [log["loss"] for log in logs[: len(early)]]
        if half < _LEAST_LOGS // 2 or _moved(early, late) or _moved(begin, late):
            return
        self.warned = True
        if state.is_world_process_zero:
            logger.warning(
                "The loss has not moved in steps %d to %d (from %.4g to %.4g) although the "
                "learning rate is above 0: it may be far too low or too high, the labels may have "
                "nothing to do with the texts, or the adapter may be on modules that do not "
                "matter (--learning_rate, --lora_target_modules).",
                max(end - self.steps, 0) + 1,
                end,
                fmean(begin),
                fmean(late),
            )


class WarnSlowdown(TrainerCallback):
    """Warns when the speed is under half of the session's median for a minute and three logs."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.speeds: deque[float] = deque(maxlen=1000)
        self.warned, self.slow = False, 0
        self.logged = self.since = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier session."""
        self._forget()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare the log's speed with those before."""
        speed = (logs or {}).get("examples_per_second")
        if speed is None:
            return
        usual = median(self.speeds) if len(self.speeds) >= _LEAST_LOGS - _SLOW_LOGS else 0.0
        self.speeds.append(speed)
        before, self.logged = self.logged, time.monotonic()
        if speed >= usual / 2:
            self.since, self.slow, self.warned = self.logged, 0, False
            return
        self.since = before if self.slow == 0 else self.since
        self.slow += 1
        seconds = self.logged - self.since
        if self.warned or self.slow < _SLOW_LOGS or seconds < SLOW_SECONDS:
            return
        self.warned = True
        if state.is_world_process_zero:
            logger.warning(
                "Step %d: training runs at %.3g examples/s, under half of this run's median of "
                "%.3g, for %.0f s: another job on the machine, a slow disk, a GPU that "
                "throttles, or swapping.",
                state.global_step,
                speed,
                usual,
                seconds,
            )


def _moved(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the mean has fallen by more than its noise."""
    noise = (_variance(before) / len(before) + _variance(after) / len(after)) ** 0.5
    return fmean(before) - fmean(after) > max(2 * noise, 1e-4 * abs(fmean(before)))


def _variance(values: Sequence[float]) -> float:
    """Of the noise, from successive differences, which a trend adds little to (von Neumann)."""
    return fmean((b - a) ** 2 for a, b in pairwise(values)) / 2
