"""Optimizer steps and the examples that they see, as the Trainer counts them.

Run: python -m pytest tests/data/test_schedule.py
"""

import pytest

from lora_fsdp.data.schedule import Schedule
from tests.support.runs import toy_trainer

TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "max_steps": -1,
}


@pytest.mark.parametrize(("steps", "examples"), [(0, 0), (2, 16), (3, 20), (4, 28), (7, 48)])
def test_the_last_step_of_an_epoch_has_fewer_examples(steps, examples):
    schedule = Schedule.of(TRAINING, rows=20, ranks=1)  # 8, 8 and 4
    assert schedule.steps_per_epoch == 3
    assert schedule.examples_before(steps) == examples


@pytest.mark.parametrize(
    ("changes", "ranks", "steps", "examples"),
    [
        ({}, 1, 9, 60),
        ({}, 2, 6, 60),
        ({"num_train_epochs": 1.4}, 1, 5, 36),
        ({"max_steps": 4}, 1, 4, 28),
        ({"num_train_epochs": 0.1}, 1, 1, 8),
    ],
)
def test_steps_of_a_run(changes, ranks, steps, examples):
    schedule = Schedule.of({**TRAINING, **changes}, rows=20, ranks=ranks)
    assert (schedule.steps, schedule.examples) == (steps, examples)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, 0),
        ({"eval_strategy": "epoch"}, 3),
        ({"eval_strategy": "epoch", "max_steps": 4}, 2),  # an epoch has three; the last is partial
        ({"eval_strategy": "steps", "eval_steps": 2}, 5),  # the last step, too
        ({"eval_strategy": "steps", "logging_steps": 3}, 3),
        ({"eval_strategy": "steps", "eval_steps": 0.25}, 3),  # of nine steps every third
        ({"early_stopping_patience": 2}, 3),
    ],
)
def test_evaluations_are_as_many_as_the_trainer_makes(tmp_path, given, count):
    """Counted by a run, of which nothing stops early."""
    usual = {"eval_strategy": "no", "save_strategy": "no", "num_train_epochs": 3}
    if "early_stopping_patience" in given:
        usual |= {"save_strategy": "epoch", "early_stopping_threshold": 0.0, "learning_rate": 1e-3}
    trainer = toy_trainer(tmp_path, **usual | given)
    trainer.train()
    made = sum("eval_loss" in entry for entry in trainer.state.log_history)
    found = Schedule.of(vars(trainer.args), rows=24, ranks=1)
    assert found.evaluations(vars(trainer.args)) == count
    assert made == count
    assert trainer.work.evaluations == count
