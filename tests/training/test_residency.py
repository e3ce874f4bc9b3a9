"""Layers that every rank keeps whole: fewer gathers, the same training.

Run: python -m pytest tests/training/test_residency.py
"""

import numpy as np
import pytest
import torch
import torch.distributed.fsdp._fully_shard._fsdp_param_group as groups
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_fsdp.adapter.saved import adapter_state
from lora_fsdp.base.layers import decoder_layers
from lora_fsdp.distributed.residency import plan_residency
from lora_fsdp.errors import ArgumentError
from lora_fsdp.training import place as placement
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run, toy_trainer
from tests.support.tiny import tiny_model

FSDP = launch_environment("fsdp2_cpu.yaml")
FULL_SHARD = {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "true"}
CPU = torch.device("cpu")


def run(folder, resident, steps, head=False):
    """A run, and the gathers of each of its steps; with `head` as where memory asks for a head on
    every rank.
    """
    gathers = 0
    if head:
        plan = placement.plan_residency
        placement.plan_residency = lambda asked, layers, base, **others: plan(
            asked, layers, base, **others
        ).with_head(base.get_output_embeddings())
    original = groups.foreach_all_gather

    def counted(*arguments, **options):
        nonlocal gathers
        gathers += 1
        return original(*arguments, **options)

    groups.foreach_all_gather = counted
    trainer = toy_trainer(folder, resident_layers=resident, max_steps=steps)
    gathers = 0
    trainer.train()
    counts = gathers / steps
    groups.foreach_all_gather = original
    base = trainer.model.get_base_model()
    return {
        "gathers": counts,
        "adapter": {n: p.numpy() for n, p in adapter_state(trainer.model).items()},
        "sharded_layers": sum(isinstance(layer, FSDPModule) for layer in decoder_layers(base)),
        "any_shard": any(isinstance(p, DTensor) for p in base.parameters()),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "plan": str(trainer.plan),
    }


@pytest.mark.distributed
# A layer and the head are gathered in forward and in backward, the embeddings and the root once.
@pytest.mark.parametrize(
    ("resident", "head", "gathers", "sharded"),
    [
        ("none", False, 2 * 4 + 2, 3),
        ("none", True, 2 * 3 + 2, 3),
        ("1", False, 2 * 3 + 2, 2),
        ("1", True, 2 * 2 + 2, 2),
        ("all", False, 0, 0),
    ],
)
def test_same_adapter_as_one_process(tmp_path, resident, head, gathers, sharded):
    alone = toy_run(tmp_path / "alone", max_steps=3, per_device_train_batch_size=16)
    for rank in run_ranks(run, tmp_path / "two", resident, 3, head, environment=FULL_SHARD):
        assert ("the output head stays" in rank["plan"]) == head
        assert rank["sharded_layers"] == sharded
        assert rank["any_shard"] == (sharded > 0)
        assert rank["gathers"] == gathers
        for name, expected in alone["adapter"].items():
            assert np.allclose(rank["adapter"][name], expected, atol=1e-4), name
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-5)


class TestPlan:
    def plan(self, requested, *, settings, device=CPU):
        base = tiny_model()
        layers = decoder_layers(base)
        return plan_residency(
            requested, layers, base, settings=settings, device=device,
            fitting_layers=lambda free: 1,
        )  # fmt: skip

    def test_without_fsdp_everything_is_resident(self):
        assert self.plan("auto", settings=None).is_whole

    def test_without_fsdp_there_is_nothing_to_choose(self):
        with pytest.raises(ArgumentError, match=r"--resident_layers 1 needs an accelerate YAML"):
            self.plan("1", settings=None)

    @pytest.mark.parametrize("wrong", ["4", "-1", "most", "1.5", "²"])
    def test_layers_the_model_does_not_have(self, wrong):
        with pytest.raises(ArgumentError, match=rf"--resident_layers {wrong}: .* up to 3"):
            self.plan(wrong, settings=Settings())

    def test_spread_evenly(self):
        assert self.plan("2", settings=Settings()).indices == {0, 1}
        assert self.plan("1", settings=Settings()).indices == {0}

    def test_rehearsal_shards(self):
        assert not self.plan("auto", settings=Settings()).indices

    def test_one_group_is_all_or_nothing(self):
        settings = Settings()
        settings.wrap_layers = False
        with pytest.raises(ArgumentError, match="TRANSFORMER_BASED_WRAP"):
            self.plan("2", settings=settings)
        assert self.plan("all", settings=settings).is_whole


class Settings:
    wrap_layers = True
    offload = False
