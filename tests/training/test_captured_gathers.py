"""Steps that gather layers, captured: every rank captures what one of them needs, in one order.

On a CPU nothing is captured; what stands for a graph here runs the padded row when it is replayed,
so that the ranks gather as they would. tests/gpu/test_two_gpus.py captures.

Run: python -m pytest tests/training/test_captured_gathers.py
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lora_fsdp.data.packing import empty_row
from lora_fsdp.distributed.captured_gathers import why_gathers_not_captured
from lora_fsdp.distributed.memory import RowSizes
from lora_fsdp.errors import CaptureError
from lora_fsdp.modeling.adapters import adapter_state
from lora_fsdp.training.step import CapturedStep
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run, toy_trainer

FULL_SHARD = {**launch_environment("fsdp2_cpu.yaml"), "FSDP_RESHARD_AFTER_FORWARD": "true"}


@dataclass
class Replayed:
    """Stands for a graph."""

    step: CapturedStep
    size: object

    def load(self, row, *, scale):
        self.row = row.padded(tokens=self.size.tokens, labels=self.size.labels)
        self.scale = scale

    @property
    def graph(self):
        return self

    def replay(self):
        self.loss = self.step._forward_backward(self.row, scale=self.scale)


class StandIn(CapturedStep):
    """Captures nothing, but gathers as a capture does."""

    def _capture(self, size):
        gradients = self.adapter.copy_gradients()
        graph = Replayed(self, size)
        graph.load(empty_row(), scale=0.0)
        for _ in range(1 if self._graphs else 2):
            graph.replay()
        self.adapter.set_gradients(gradients)
        return graph


def step_like(trainer, kind):
    eager = trainer.step
    return kind(
        eager.model, largest=RowSizes(tokens=400, labels=40), gathers=True,
        computation=eager.computation, adapter=eager.adapter, device=eager.device,
        autocast=eager.autocast,
    )  # fmt: skip


def captured_run(folder, options):
    trainer = toy_trainer(folder, **options)
    trainer.step = step_like(trainer, StandIn)
    ran = []
    run = trainer.step.run
    trainer.step.run = lambda row, **others: ran.append(row.size) or run(row, **others)
    trainer.train()
    return {
        "captured": list(trainer.step._graphs),
        "ran": ran,
        "adapter": {n: p.numpy() for n, p in adapter_state(trainer.model).items()},
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("most_tokens", "examples"), [(None, 4), (128, 8)])
def test_ranks_capture_the_same_sizes_in_the_same_order(tmp_path, most_tokens, examples):
    """Rows of different sizes at once, and with `most_tokens` several a step."""
    options = {"per_device_train_batch_size": examples, "max_tokens_per_row": most_tokens}
    alone = toy_run(tmp_path / "alone", **options | {"per_device_train_batch_size": 2 * examples})
    ranks = run_ranks(captured_run, tmp_path / "two", options, environment=FULL_SHARD)
    assert ranks[0]["captured"] == ranks[1]["captured"]
    assert ranks[0]["captured"][0].tokens > 300  # the largest that was foretold
    assert any(a != b for a, b in zip(ranks[0]["ran"], ranks[1]["ran"], strict=True))
    assert (len(ranks[0]["ran"]) > len(ranks[0]["losses"])) == (most_tokens is not None)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, expected in alone["adapter"].items():
            assert np.allclose(rank["adapter"][name], expected, atol=1e-4), name


def test_a_capture_that_fails_ends_the_run(tmp_path):
    """The other ranks would wait for its gathers."""

    class Failing(CapturedStep):
        def _capture(self, size):
            raise RuntimeError("out of memory\nmore")

    trainer = toy_trainer(tmp_path)
    trainer.step = step_like(trainer, Failing)
    with pytest.raises(
        CaptureError, match=r"cannot be captured.*out of memory\. Run with --step f"
    ):
        trainer.train()


def gathers_here(folder):
    toy_trainer(folder)  # connects the ranks
    return why_gathers_not_captured(torch.device("cpu"))


@pytest.mark.distributed
def test_other_backends_gather_outside_graphs(tmp_path):
    assert gathers_here(tmp_path) is None  # one rank: nothing is gathered
    found = run_ranks(gathers_here, tmp_path, environment=FULL_SHARD)
    assert found == ["gloo gathers outside CUDA graphs"] * 2
