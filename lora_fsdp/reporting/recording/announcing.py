"""What a run says before it starts."""

from __future__ import annotations

from lora_fsdp.adapter.targets import targets_in_words
from lora_fsdp.data.checking import check_task_data
from lora_fsdp.data.rows import TaskData
from lora_fsdp.distributed.status import FsdpStatus
from lora_fsdp.printing import say, visible
from lora_fsdp.training.rivals import rows_to_probe
from lora_fsdp.training.trainer import LoraTrainer


def announce(trainer: LoraTrainer, data: TaskData, status: FsdpStatus) -> None:
    """Say what is about to happen, before it costs anything."""
    answers = data.task.answer_kind.announcement(max_new_tokens=trainer.max_new_tokens)
    test = f", {len(data.test)} for the test" if data.test else ""
    rows = f"{len(data.train)} training rows, {len(data.held_out)} held out{test}"
    say(f"Task {data.task.name}: {rows}")
    for line in data.splits:
        say(f"  {visible(line, lines=False)}")
    say(f"  answers: {visible(answers, lines=False)}")
    if (chat := trainer.encoder.chat) is not None and chat.announcement:
        say(f"  answers stand {visible(chat.announcement, lines=False)}")
    if data.shots:
        numbers = ", ".join(str(shot.row) for shot in data.shots)
        say(f"  every prompt shows these rows, which are not trained on (--few_shot): {numbers}")
    if data.dropped:
        say(f"  rows left out as unusable: {data.dropped}")
    say(f"  rows whose text was shortened to fit: {trainer.shortened}")
    encoded = [*trainer.train_dataset, *trainer.held_out, *trainer.test_dataset]
    for warning in check_task_data(data, encoded).warnings:
        say(f"  warning: {visible(warning, lines=False)}")
    shared = "yes" if trainer.placement.shares_prefix else "no"
    say(f"  prompts' common prefix computed once a packed sequence: {shared}")
    say(f"  {targets_in_words(trainer.model)}")
    say(str(status))
    say(str(trainer.placement))
    which = "test" if data.test else "held-out"
    what = f"Scoring the untrained model on {len(data.reported)} {which} rows"
    probed = len(rows_to_probe(trainer.task, trainer.args, trainer.train_dataset))
    also = f" and {probed} training rows (--probe_rows)" if probed else ""
    say(f"{what}{also}, then training.", flush=True)
