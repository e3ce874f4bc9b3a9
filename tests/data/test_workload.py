"""What a run is said to compute, beside its steps themselves.

Run: python -m pytest tests/data/test_workload.py
"""

import math

import pytest

from lora_fsdp.data import workload
from lora_fsdp.data.sampling import TrainingSteps, epoch_order
from lora_fsdp.data.workload import measure_work
from tests.support.runs import toy_trainer


def examples_of(tmp_path, rows):
    """Of one length nearly all, and some long ones that few steps see."""
    trainer = toy_trainer(tmp_path, rows=rows)
    examples = trainer.train_dataset
    for index in (3, 50, 77):
        examples[index].prompt_ids.extend([7] * index)
    return examples


def training(per_rank, epochs, seed=0):
    return {
        "per_device_train_batch_size": per_rank, "gradient_accumulation_steps": 1,
        "num_train_epochs": epochs, "max_steps": -1, "seed": seed, "data_seed": None,
        "max_tokens_per_row": None,
    }  # fmt: skip


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize(
    ("ranks", "per_rank", "epochs", "seed"),
    [(1, 2, 1.0, 0), (2, 2, 3.0, 5), (2, 3, 1.4, 1), (4, 1, 0.2, 2), (1, 200, 2.0, 3)],
)
def test_the_largest_step_is_found(tmp_path, share_prefix, ranks, per_rank, epochs, seed):
    examples = examples_of(tmp_path, 120)
    work = measure_work(
        training(per_rank, epochs, seed), examples, [], ranks=ranks, share_prefix=share_prefix
    )
    largest = 0
    for rank in range(ranks):
        steps = TrainingSteps(
            examples, examples_per_step=min(per_rank * ranks, len(examples)), rank=rank,
            world_size=ranks, seed=seed, share_prefix=share_prefix, max_tokens=2**31,
        )  # fmt: skip
        for epoch in range(math.ceil(epochs)):
            steps.set_epoch(epoch)
            count = math.ceil(min(1.0, epochs - epoch) * len(steps))
            for index in range(count):
                largest = max(largest, sum(map(len, steps[index].sequences)))
    assert work.largest_step == largest


def test_many_epochs_are_not_all_looked_at(tmp_path, monkeypatch):
    examples = examples_of(tmp_path, 120)
    first = measure_work(training(2, 2.0), examples, [], ranks=1, share_prefix=True)
    monkeypatch.setattr(workload, "_EXAMPLES_LOOKED_AT", 240)
    orders = []
    monkeypatch.setattr(
        workload, "epoch_order", lambda *a, **k: orders.append(k["epoch"]) or epoch_order(*a, **k)
    )
    work = measure_work(training(2, 1e9), examples, [], ranks=1, share_prefix=True)
    assert orders == [0, 1]
    assert work.largest_step == first.largest_step
