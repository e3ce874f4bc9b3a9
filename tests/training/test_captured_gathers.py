"""Steps that gather layers, captured: all ranks capture, replay or launch the same at once.

On a CPU nothing is captured; what stands for a graph here runs the padded row when it is replayed,
so that the ranks gather as they would. tests/gpu/test_two_gpus.py captures.

Run: python -m pytest tests/training/test_captured_gathers.py
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lora_fsdp import ranks as group
from lora_fsdp.adapter.saved import adapter_state
from lora_fsdp.base.layers import base_model, decoder_layers
from lora_fsdp.data.packing import SequenceSize, Tree, empty_sequence, pack_sequence
from lora_fsdp.distributed.captured_gathers import why_gathers_not_captured
from lora_fsdp.errors import CaptureError
from lora_fsdp.placement.memory import LargestSequence
from lora_fsdp.training.step.captured import CapturedStep
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

    def with_sequence(self):
        self.sequence, self.scale = empty_sequence(), 0.0
        return self

    @property
    def graph(self):
        return self

    def replay(self):
        self.step.replayed = True
        self.loss = self.step._forward_backward(self.row, scale=self.scale)


class StandIn(CapturedStep):
    """Captures nothing, but gathers as a capture does."""

    def _capture(self, size):
        gradients = self.adapter.copy_gradients()
        graph = Replayed(self, size)
        graph.load(empty_sequence(), scale=0.0)
        for _ in range(1 if self._graphs else 2):
            graph.replay()
        self.adapter.set_gradients(gradients)
        return graph


def step_like(trainer, kind, *, tokens=400, gathers=True):
    eager = trainer.step
    return kind(
        eager.packed, gathers=gathers,
        largest=LargestSequence(tokens=tokens, labels=40 if tokens else 0),
        objective=eager.objective, adapter=eager.adapter, device=eager.device,
        autocast=eager.autocast,
    )  # fmt: skip


def captured_run(folder, options):
    trainer = toy_trainer(folder, **options)
    trainer.step = step_like(trainer, StandIn)
    rows, computed = [], []
    run, compute = trainer.step.run, trainer.step._forward_backward
    trainer.step.run = lambda row, **others: rows.append(row.size) or run(row, **others)
    trainer.step._forward_backward = lambda row, **others: (
        computed.append(row.size) or compute(row, **others)
    )
    trainer.train()
    assert not trainer.step._graphs
    return {
        "captured": trainer.step.captured,
        "rows": rows,
        "computed": computed,
        "adapter": {n: p.numpy() for n, p in adapter_state(trainer.model).items()},
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("most_tokens", "examples"), [(None, 4), (128, 8)])
def test_ranks_compute_the_same_sizes_in_the_same_order(tmp_path, most_tokens, examples):
    """Of rows that are of different sizes, with `most_tokens` several a step."""
    options = {"per_device_train_batch_size": examples, "max_tokens_per_row": most_tokens}
    alone = toy_run(tmp_path / "alone", **options | {"per_device_train_batch_size": 2 * examples})
    ranks = run_ranks(captured_run, tmp_path / "two", options, environment=FULL_SHARD)
    assert ranks[0]["captured"] == ranks[1]["captured"]
    assert ranks[0]["captured"][0].tokens > 300  # the largest that was predicted
    assert ranks[0]["computed"] == ranks[1]["computed"]
    assert any(a != b for a, b in zip(ranks[0]["rows"], ranks[1]["rows"], strict=True))
    assert (len(ranks[0]["rows"]) > len(ranks[0]["losses"])) == (most_tokens is not None)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, expected in alone["adapter"].items():
            assert np.allclose(rank["adapter"][name], expected, atol=1e-4), name


@pytest.mark.distributed
def test_ranks_launch_together_what_is_too_long_for_one(tmp_path):
    """A sequence of one rank that no graph holds: the others' is not replayed either."""
    for rank in run_ranks(long_and_short, tmp_path, environment=FULL_SHARD):
        assert rank == {"captured": [(32, 32, False)], "replayed": [True, False]}


def long_and_short(folder):
    """A short row on both ranks, then a long one on the second."""
    trainer = toy_trainer(folder)
    step = step_like(trainer, StandIn, tokens=0)
    second, replayed = trainer.args.process_index == 1, []
    short, long = SequenceSize(20, 8, False), SequenceSize(5000, 8, False)
    for sizes in ([short, short], [short, long]):
        tokens = sizes[second].tokens
        row = pack_sequence([Tree([5] * (tokens - 7), [[7] * 8], [1.0])], share_prefix=True)
        step.run(row, denominator=8, sizes_of_ranks=sizes)
        replayed.append(step.replayed)
        step.replayed = False
    return {"captured": [tuple(size) for size in step.captured], "replayed": replayed}


def test_sizes_of_other_ranks_must_be_given(tmp_path):
    step = step_like(toy_trainer(tmp_path), StandIn)
    row = pack_sequence([Tree([5, 6], [[7]], [1.0])], share_prefix=True)
    with pytest.raises(ValueError, match="2 ranks were given, and there are 1"):
        step([row], denominator=1, sizes_of_ranks=[[row.size, row.size]])


def test_the_largest_row_is_captured_first_as_rows_are(tmp_path):
    """As one sequence where the first row is one, though too short for that to matter to it."""
    step = step_like(toy_trainer(tmp_path), StandIn, tokens=2900, gathers=False)
    step._capture = lambda size: Replayed(step, size)
    row = pack_sequence([Tree([5] * 300, [[7] * 8], [1.0])], share_prefix=True)
    step([row], denominator=8)
    assert step.captured == [SequenceSize(3072, 64, True), SequenceSize(320, 32, False)]


class Breaking(StandIn):
    """Whose capture is broken off in the middle of forward, which the second rank reports.

    On both ranks: unlike a capture, what stands for it here does wait for the other rank.
    """

    def _capture(self, size):
        graph = super()._capture(size)
        last = decoder_layers(base_model(self.packed.model))[-1]
        handle = last.register_forward_pre_hook(_break_off)
        try:
            graph.replay()
        except RuntimeError:
            if group.rank() == 1:
                raise
        finally:
            handle.remove()
        return graph


def _break_off(*_):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def broken_run(folder, options):
    trainer = toy_trainer(folder, **options)
    trainer.step = step_like(trainer, Breaking, tokens=0)
    trainer.train()
    return {
        "failed": trainer.step.failed,
        "captured": len(trainer.step.captured),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "adapter": {n: p.numpy() for n, p in adapter_state(trainer.model).items()},
    }


@pytest.mark.distributed
def test_a_capture_that_fails_on_one_rank_leaves_all_to_the_eager_step(tmp_path):
    """As exact as if nothing had been captured, and no rank waits for another's graph."""
    options = {"per_device_train_batch_size": 4, "max_tokens_per_row": 128}
    alone = toy_run(tmp_path / "alone", **options | {"per_device_train_batch_size": 8})
    for found in run_ranks(broken_run, tmp_path / "two", options, environment=FULL_SHARD):
        assert found["failed"] == "operation not permitted when stream is capturing"
        assert found["captured"] == 0
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, expected in alone["adapter"].items():
            assert np.allclose(found["adapter"][name], expected, atol=1e-4), name


def test_what_cannot_be_computed_ends_the_run(tmp_path):
    """Before it is captured, where the other ranks already wait for its gathers."""

    class TooLarge(StandIn):
        _capture = CapturedStep._capture

        def _forward_backward(self, sequence, *, scale):
            raise RuntimeError("out of memory\nmore")

    trainer = toy_trainer(tmp_path)
    step = step_like(trainer, TooLarge)
    with pytest.raises(CaptureError, match=r"cannot be computed: out of memory\. Lower"):
        step._warm_up(Replayed(step, SequenceSize(20, 8, False)).with_sequence())


def gathers_here(folder):
    toy_trainer(folder)  # connects the ranks
    return why_gathers_not_captured(torch.device("cpu"))


@pytest.mark.distributed
def test_other_backends_gather_outside_graphs(tmp_path):
    assert gathers_here(tmp_path) is None  # one rank: nothing is gathered
    found = run_ranks(gathers_here, tmp_path, environment=FULL_SHARD)
    assert found == ["gloo gathers outside CUDA graphs"] * 2
