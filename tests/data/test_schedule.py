"""Optimizer steps and the examples that they see, as the Trainer counts them.

Run: python -m pytest tests/data/test_schedule.py
"""

import pytest

from lora_fsdp.data.schedule import Schedule

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
