"""Layers that every rank keeps whole: fewer gathers, the same training.

Run: python -m pytest tests/training/test_residency.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch.distributed.fsdp._fully_shard._fsdp_param_group as groups
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_fsdp.adapter.saved import adapter_state
from lora_fsdp.base.layers import decoder_layers
from lora_fsdp.training import placing as place
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run, toy_trainer

FSDP = launch_environment("fsdp2_cpu.yaml")
FULL_SHARD = {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "true"}


def run(folder, resident, steps, head=False):
    """A run, and the gathers of each of its steps; with `head` as where memory asks for a head on
    every rank.
    """
    gathers = 0
    if head:
        decide = place.decide

        def with_head(*facts):
            found = decide(*facts)
            return replace(found, layout=replace(found.layout, whole_head=not found.is_whole))

        place.decide = with_head
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
        "plan": str(trainer.placement),
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
