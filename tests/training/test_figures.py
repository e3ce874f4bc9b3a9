"""Speed, remaining time and cost in the logs.

Run: python -m pytest tests/training/test_figures.py
"""

import time

import pytest
import torch
from transformers import TrainerCallback

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.sampling import TrainingSteps
from lora_fsdp.tasks import Example, Prompt
from lora_fsdp.training.logging.figures import RunFigures
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer


def examples(count):
    source = Example(0, Prompt("", "text", ""), " answer")
    return [EncodedExample(i, [1] * (i + 2), [3, 0], (), None, False, source) for i in range(count)]


def figures(count=10, **more):
    options = {
        "examples_per_step": 4,
        "seed": 3,
        "device": torch.device("cpu"),
        "world_size": 1,
        "price_per_hour": None,
    }
    return RunFigures(examples(count), **{**options, **more})


class TestCounts:
    @pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (0, 3), (2, 8), (3, 3)])
    def test_are_those_of_the_steps(self, first, last):
        """The last step of an epoch is short, and epochs have their own orders."""
        rows = examples(10)
        steps = TrainingSteps(
            rows, examples_per_step=4, rank=0, world_size=1, seed=3, share_prefix=False,
            max_tokens=99,
        )  # fmt: skip
        seen = []
        for step in range(first, last):
            epoch, place = divmod(step, len(steps))
            steps.set_epoch(epoch)
            seen += steps[place].example_rows
        tokens = sum(len(rows[i].prompt_ids) + len(rows[i].target_ids) for i in seen)
        assert figures()._seen(first, last) == (len(seen), tokens)


class TestTimes:
    def test_speed_since_the_last_log(self):
        run = figures()
        run.start(0)
        time.sleep(0.05)
        first = run.at(2, last=4)
        assert first["examples_per_second"] == pytest.approx(8 / 0.05, rel=0.5)
        assert first["eta_seconds"] == pytest.approx(0.05, rel=0.5)
        run.leave_out(-10)  # ten seconds more
        assert run.at(3, last=4)["examples_per_second"] == pytest.approx(2 / 10, rel=0.1)

    def test_an_evaluation_is_left_out(self):
        run = figures()
        time.sleep(0.2)
        run.leave_out(0.19)
        assert run.at(1, last=4)["examples_per_second"] > 50

    def test_cost_is_only_there_with_a_price(self):
        assert "cost" not in figures().at(1, last=2)
        cheap = figures(price_per_hour=1.0).at(1, last=2)["cost"]
        dear = figures(price_per_hour=1000.0).at(1, last=2)["cost"]
        assert 0 < cheap * 900 < dear


class Collect(TrainerCallback):
    """What a tracker gets."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def logged(folder):
    collected = Collect()
    trainer = toy_trainer(folder, callbacks=[collected], price_per_hour=1.0, eval_strategy="epoch")
    trainer.train()
    return collected.logs, trainer.state.log_history


class TestInARun:
    def test_trackers_get_them_beside_the_loss(self, tmp_path):
        logs, history = logged(tmp_path)
        names = {"examples_per_second", "tokens_per_second", "eta_seconds", "cost"}
        with_loss = [entry for entry in logs if "loss" in entry]
        assert len(with_loss) == 6
        assert all(names <= set(entry) for entry in with_loss)
        assert with_loss[-1]["eta_seconds"] == 0
        assert [e["cost"] for e in history if "loss" in e] == [e["cost"] for e in with_loss]
        assert not any(names & set(entry) for entry in logs if "eval_loss" in entry)

    @pytest.mark.distributed
    def test_ranks_count_the_same_examples(self, tmp_path):
        results = run_ranks(logged, tmp_path, environment=launch_environment("fsdp2_cpu.yaml"))
        tokens_an_example = [
            [e["tokens_per_second"] / e["examples_per_second"] for e in logs if "loss" in e]
            for logs, _ in results
        ]
        assert len(tokens_an_example[0]) == 4
        assert tokens_an_example[0] == pytest.approx(tokens_an_example[1])
