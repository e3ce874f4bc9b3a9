"""Weights with which nothing can be computed are named before training.

Run: python -m pytest tests/training/test_weights.py
"""

import pytest
import torch

from lora_fsdp.errors import UnsupportedModelError
from lora_fsdp.training.checks import check_weights
from tests.support.ranks import RankError, launch_environment, run_ranks
from tests.support.runs import toy_trainer
from tests.support.tiny import tiny_model


@pytest.mark.parametrize("value", [1e38, -1e20, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_weight_with_which_nothing_can_be_computed(name, value, tmp_path):
    """It is named, and not the gradients that it swallows."""
    model = tiny_model()
    model.get_parameter(name).data[..., 5] = value
    model.save_pretrained(tmp_path / "base")
    expected = "is not finite" if value != value or abs(value) == float("inf") else "so large that"
    with pytest.raises(UnsupportedModelError, match=expected) as caught:
        toy_trainer(tmp_path / "run", base=tmp_path / "base", streamed=True)
    layer = name.removesuffix(".weight").rpartition("model.")[2]
    assert layer in str(caught.value)


def test_an_adapter_that_is_not_finite_is_not_the_base_s_fault(tmp_path):
    trainer = toy_trainer(tmp_path / "run", max_steps=1)
    weight = next(iter(trainer.adapter.parameters.values()))
    with torch.no_grad():
        weight[0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"the adapter's .*lora_A.* not finite"):
        check_weights(trainer.model)


def trainer_on(folder, base):
    toy_trainer(folder, base=base, streamed=True)


@pytest.mark.distributed
def test_every_rank_says_so(tmp_path):
    """The weight is in one rank's shard only."""
    model = tiny_model()
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[0, 5] = 1e30
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(RankError, match=r"down_proj\.weight holds 1e"):
        run_ranks(
            trainer_on, tmp_path / "run", tmp_path / "base",
            environment=launch_environment("fsdp2_cpu.yaml"),
        )  # fmt: skip
