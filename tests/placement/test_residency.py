"""How many layers every rank keeps. Run: python -m pytest tests/placement/test_residency.py"""

from dataclasses import replace

import pytest
from peft import LoraConfig

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.data.workload import NO_WORK
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.decide import decide
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.request import Request
from lora_fsdp.sizing.counting import shape_of
from tests.support.tiny import tiny_model

SHARDED = FsdpSettings(True, False, False, None, True)
CPU = Hardware.without_gpu(2)


@pytest.fixture(scope="module")
def shape():
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return shape_of(tiny_model().to("meta"), adapter)


def placed(shape, requested, *, settings=SHARDED, hardware=CPU):
    return decide(shape, NO_WORK, hardware, Request(resident_layers=requested, fsdp=settings))


def test_without_fsdp_everything_is_resident(shape):
    assert placed(shape, "auto", settings=None).is_whole


def test_without_fsdp_there_is_nothing_to_choose(shape):
    with pytest.raises(ArgumentError, match=r"--resident_layers 1 needs an accelerate YAML"):
        placed(shape, "1", settings=None)


@pytest.mark.parametrize("wrong", ["4", "-1", "most", "1.5", "²"])
def test_layers_the_model_does_not_have(shape, wrong):
    with pytest.raises(ArgumentError, match=rf"--resident_layers {wrong}: .* up to 3"):
        placed(shape, wrong)


def test_spread_evenly(shape):
    assert placed(shape, "2").layout.resident_of(3) == {0, 1}
    assert placed(shape, "1").layout.resident_of(3) == {0}


def test_rehearsal_shards(shape):
    assert not placed(shape, "auto").layout.resident_of(3)


def test_one_group_is_all_or_nothing(shape):
    settings = replace(SHARDED, wrap_layers=False)
    with pytest.raises(ArgumentError, match="TRANSFORMER_BASED_WRAP"):
        placed(shape, "2", settings=settings)
    assert placed(shape, "all", settings=settings).is_whole


@pytest.mark.parametrize("requested", ["all", "3"])
def test_an_offloaded_base_is_not_kept_whole(shape, requested):
    with pytest.raises(ArgumentError, match=r"fsdp_offload_params.* in host memory: drop one"):
        placed(shape, requested, settings=replace(SHARDED, offload=True))
