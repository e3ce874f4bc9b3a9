"""The log of a run as a file that grows with it, so that an unfinished run can be looked at."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_fsdp.evaluation.outputs import LOG_FILE

logger = logging.getLogger(__name__)


class KeepLog(TrainerCallback):
    """Rank 0 writes each log line to `log_history.jsonl` in the run's folder as it comes.

    The first line says how many steps there will be and at which one this session began; the others
    are the Trainer's `log_history`, with the time in seconds since 1970. A resumed run keeps the
    lines up to its checkpoint.

    Attributes:
        first_step: the optimizer step at which this session began; 0 unless the run was resumed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LOG_FILE
        self.first_step = 0
        # Lines that the disk had no room for, to be written with the next; the last may be cut off.
        self._waiting = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file, with the log that a checkpoint holds."""
        self.first_step = state.global_step
        if state.is_world_process_zero:
            begin: dict[str, Any] = {"max_steps": state.max_steps, "first_step": state.global_step}
            text = "".join(_line(entry) for entry in [begin, *state.log_history])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text, encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the newest line."""
        if not (state.is_world_process_zero and self.path.is_file()):
            return
        entry = {**state.log_history[-1], "time": round(time.time(), 3)}
        first, self._waiting = not self._waiting, self._waiting + _line(entry)
        size = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._waiting)
            self._waiting = ""
        except OSError as error:  # no reason to lose what has been trained
            os.truncate(self.path, size)
            if first:
                logger.warning(
                    "%s cannot be written (%s); training goes on. Make room before the next "
                    "checkpoint, which the run ends without.", self.path, error.strerror,
                )  # fmt: skip


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
