"""Resuming: on other processes, from damaged checkpoints, with other settings; stopping on request.

Run: python -m pytest tests/training/test_resume.py
"""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from lora_fsdp.errors import TrainingInterrupted
from lora_fsdp.training.saving.checkpoints import find_damage, list_checkpoints
from tests.faults.toy_run import ending
from tests.support.ranks import RankError, launch_environment, run_ranks
from tests.support.runs import toy_trainer

pytestmark = pytest.mark.distributed

FSDP = launch_environment("fsdp2_cpu.yaml")
SAVING = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 4}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def part(output_dir, options, *, stop=None, resume=True):
    """A part of a run; its losses so far and the rows that this rank saw at each step."""
    callbacks = [] if stop is None else [StopAt(stop)]
    trainer = toy_trainer(output_dir, callbacks=callbacks, **SAVING | options)
    seen = []
    training_step = trainer.training_step

    def recorded(model, inputs, *rest):
        seen.append((trainer.state.global_step, inputs.example_rows))
        return training_step(model, inputs, *rest)

    trainer.training_step = recorded
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "seen": seen}


def first_part(output_dir, options, stop):
    return part(output_dir, options, stop=stop, resume=False)


def middle_part(output_dir, options, stop):
    return part(output_dir, options, stop=stop)


def ranks(function, world_size, *arguments):
    environment = FSDP if world_size > 1 else None
    return run_ranks(function, *arguments, world_size=world_size, environment=environment)


def test_other_processes_and_accumulation_give_the_same_run(tmp_path):
    """1, 2, 4 and 1 processes, changed at the end of an epoch and within epochs."""
    alone = {"per_device_train_batch_size": 8}
    [whole] = ranks(first_part, 1, tmp_path / "whole", alone, None)
    folder = tmp_path / "run"
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    four = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    parts = [
        *ranks(first_part, 1, folder, alone, 3),
        *ranks(middle_part, 2, folder, two, 7),
        *ranks(middle_part, 4, folder, four, 10),
        *ranks(part, 1, folder, accumulated),
    ]
    last = parts[-1]["losses"]
    assert len(last) == len(whole["losses"]) == 12
    assert last == pytest.approx(whole["losses"], abs=1e-4)
    epochs = [Counter() for _ in range(4)]
    for seen in (entry for one in parts for entry in one["seen"]):
        epochs[seen[0] // 3].update(seen[1])
    assert epochs == [dict.fromkeys(range(1, 25), 1)] * 4


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run on one process, 8 examples a step, stopped after its second step."""
    folder = tmp_path_factory.mktemp("two") / "run"
    ranks(first_part, 1, folder, {}, 2)
    return folder


OTHER_RUNS = {
    "batch": ({"per_device_train_batch_size": 2}, "2 x 1 x 1 = 2: set --gradient_accumulation_st"),
    "uneven": ({"per_device_train_batch_size": 3}, "3 x 1 x 1 = 3: set --per_device_train_batc"),
    "seed": ({"seed": 4}, r"the seed \(3 in the checkpoint, 4 now\)"),
    "data_seed": ({"data_seed": 9}, r"data's order \(3 in the checkpoint, 9 now\)"),
    "rows": ({"rows": 23}, r"training examples \(24 in the checkpoint, 23 now\)"),
    "dropout": ({"dropout": 0.1}, r"LoRA's lora_dropout \(0.0 in the checkpoint, 0.1 now\)"),
    "learning rate": ({"learning_rate": 1e-3}, r"--learning_rate \(0.01 in the checkpoint"),
    "schedule": ({"lr_scheduler_type": "linear"}, "--lr_scheduler_type"),
    "base": ({"kind": "mistral"}, "architecture .LlamaForCausalLM in"),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_another_run_is_refused_with_the_values(two_steps, name):
    options, message = OTHER_RUNS[name]
    with pytest.raises(RankError, match=message) as caught:
        ranks(part, 1, two_steps, options)
    assert caught.value.kind == "ResumeMismatchError"


def test_processes_that_cannot_share_a_step(two_steps):
    with pytest.raises(RankError, match="3 processes cannot share 8 examples"):
        ranks(part, 3, two_steps, {})


def resumed_beside_damage(output_dir):
    import logging

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("lora_fsdp").addHandler(handler)
    part(output_dir, {"per_device_train_batch_size": 4})
    return [text for text in records if "Not resumed from" in text]


def test_damaged_newest_is_skipped_with_its_reason_on_every_rank(tmp_path):
    folder = tmp_path / "run"
    options = {"per_device_train_batch_size": 4}
    ranks(first_part, 2, folder, options, 4)
    os.truncate(folder / "checkpoint-4" / "training_state.safetensors", 100)
    (folder / "checkpoint-9.partial").mkdir()
    said = ranks(resumed_beside_damage, 2, folder)
    assert len(said[0]) == 1
    assert "checkpoint-4 (training_state.safetensors has 100 bytes" in said[0][0]
    assert said[1] == []
    assert find_damage(folder / "checkpoint-4") is None  # written anew
    assert not (folder / "checkpoint-9.partial").exists()


def blocked_save(output_dir):
    """A file stands where the second checkpoint is to be written."""
    trainer = toy_trainer(output_dir, per_device_train_batch_size=4, **SAVING)

    class Block(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1 and state.is_world_process_zero:
                Path(output_dir, "checkpoint-2.partial").write_text("in the way")

    trainer.add_callback(Block())
    try:
        trainer.train()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_every_rank_stops_with_the_error_of_the_rank_that_saves(tmp_path):
    results = run_ranks(blocked_save, tmp_path, environment=FSDP)
    assert results[0] == results[1]
    kind, message = results[0]
    assert kind == "CheckpointSaveError"
    assert "checkpoint-2 cannot be written" in message
    assert find_damage(tmp_path / "checkpoint-1") is None


def interrupted(output_dir, options, how):
    import torch.distributed as dist

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.05)
            if how == "SIGTERM" and state.global_step == 3 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = toy_trainer(output_dir, callbacks=[Ask()], num_train_epochs=30, **options)
    started = time.monotonic()
    try:
        trainer.train()
    except TrainingInterrupted as stop:
        threads = [t.name for t in threading.enumerate() if t.name.startswith("lora_fsdp")]
        handler = signal.getsignal(signal.SIGTERM)
        state = (threads, handler == signal.SIG_DFL)
        return stop.code, trainer.state.global_step, str(stop), time.monotonic() - started, state
    return None


@pytest.mark.parametrize(
    ("how", "options"), [("SIGTERM", {}), ("--max_hours 0.0005", {"max_hours": 0.0005})]
)
def test_ranks_stop_after_the_same_step_with_a_checkpoint(tmp_path, how, options):
    """Nothing else is saved: `save_strategy` is no."""
    options = {"per_device_train_batch_size": 4, **options}
    results = run_ranks(interrupted, tmp_path, options, how, environment=FSDP)
    codes, steps, messages, _, states = zip(*results, strict=True)
    assert set(codes) == {75}
    assert len(set(steps)) == 1
    assert how in messages[0]
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{steps[0]}"]
    assert find_damage(list_checkpoints(tmp_path)[0]) is None
    assert list(states) == [([], True)] * 2  # no thread is left, and SIGTERM is as it was


def early_stopped(output_dir):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_accuracy",
        "num_train_epochs": 20,
    }
    patience = EarlyStoppingCallback(early_stopping_patience=3)
    trainer = toy_trainer(output_dir, callbacks=[patience], **SAVING | options)
    trainer.train(resume_from_checkpoint=bool(list_checkpoints(Path(output_dir))))
    return ending(trainer)


def test_early_stopping_goes_on_where_it_was_and_stays_stopped(tmp_path):
    [whole] = run_ranks(early_stopped, tmp_path, world_size=1)
    assert 3 < whole["steps"] < 60
    [again] = run_ranks(early_stopped, tmp_path, world_size=1)
    assert again == whole
    for checkpoint in list_checkpoints(tmp_path)[:2]:  # as if killed two steps before the end
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    [resumed] = run_ranks(early_stopped, tmp_path, world_size=1)
    assert resumed == whole
