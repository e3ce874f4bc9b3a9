"""Callbacks are told of the same events in the same order as by `transformers.Trainer`.

Run: python -m pytest tests/training/test_callback_events.py
"""

import logging

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.support.runs import toy_trainer
from tests.support.tiny import tiny_model

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
# Once for each packed sequence here, and for each batch there; no step has parts here.
NOT_COMPARED = {"on_prediction_step", "on_substep_end", "on_push_begin"}


class Recorder(TrainerCallback):
    """The name of every event, with the step it comes after."""

    def __init__(self):
        self.events = []


def _record(name):
    def event(self, args, state, control, **kwargs):
        if name not in NOT_COMPARED:
            self.events.append((name, state.global_step))

    return event


for _name in EVENTS:
    setattr(Recorder, _name, _record(_name))


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Rows(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        ids = torch.arange(4) + index
        return {"input_ids": ids, "labels": ids}


def reference(folder, stop, **settings):
    recorder = Recorder()
    arguments = {
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 1,
        "disable_tqdm": True, "report_to": [], "use_cpu": True, "save_strategy": "no",
    }  # fmt: skip
    trainer = Trainer(
        tiny_model().requires_grad_(True),
        TrainingArguments(str(folder), **{**arguments, **settings}),
        train_dataset=Rows(24),
        eval_dataset=Rows(8),
        callbacks=[recorder, *stop],
    )
    trainer.train()
    return recorder.events


def ours(folder, stop, **settings):
    recorder = Recorder()
    toy_trainer(folder, callbacks=[recorder, *stop], **settings).train()
    return recorder.events


def saves_of_epochs_last_steps_later(events):
    """`events` with a save that comes after an epoch's last step put after the epoch's end.

    A checkpoint is saved when all that belongs to the epoch is done, so that a run which goes on
    from it leaves nothing of that out; that is the one difference.
    """
    moved, waiting = [], []
    for place, event in enumerate(events):
        rest = [name for name, _ in events[place:]]
        if rest[0] == "on_epoch_begin" or rest == ["on_log", "on_train_end"]:
            moved, waiting = [*moved, *waiting], []
        later = rest[0] == "on_save" and ("on_epoch_end", event[1]) in events[place:]
        (waiting if later else moved).append(event)
    return moved


SETTINGS = {
    "nothing": {},
    "logs only at the end": {"logging_steps": 100},
    "the first step logged": {"logging_steps": 100, "logging_first_step": True},
    "evaluated by steps": {"eval_strategy": "steps", "eval_steps": 2},
    "evaluated by epochs": {"eval_strategy": "epoch"},
    "evaluated at the start": {"eval_strategy": "epoch", "eval_on_start": True},
    "saved by steps": {"save_strategy": "steps", "save_steps": 2},
    "saved at every step": {"save_strategy": "steps", "save_steps": 1},
    "saved by epochs": {"save_strategy": "epoch"},
    "both by steps": {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    },
    "both by epochs": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    "the best": {
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    },
    "steps across epochs": {"num_train_epochs": 10, "max_steps": 5},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}  # fmt: skip


QUICK = ("both by steps", "the best", "accumulated")
CASES = [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in SETTINGS]


@pytest.mark.parametrize(
    "stop", [(), pytest.param((2,), marks=pytest.mark.slow)], ids=["to the end", "stopped"]
)
@pytest.mark.parametrize("case", CASES)
def test_the_events_are_the_trainers(tmp_path, case, stop):
    settings = {"num_train_epochs": 2, "logging_steps": 1, **SETTINGS[case]}
    stops = [StopAfter(step) for step in stop]
    expected = reference(tmp_path / "reference", stops, **settings)
    found = ours(tmp_path / "ours", stops, **settings)
    assert found == saves_of_epochs_last_steps_later(expected)


class Substeps(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        raise AssertionError("a step has no parts")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_callback_that_waits_for_parts_of_a_step_is_told(tmp_path, caplog, accumulation):
    trainer = toy_trainer(
        tmp_path, rows=8, max_steps=1, gradient_accumulation_steps=accumulation,
        callbacks=[Substeps()],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = "Substeps.on_substep_end is never called" in caplog.text
    assert said == (accumulation > 1)
