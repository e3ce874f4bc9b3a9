"""Which step a run takes, and why. Run: python -m pytest tests/placement/test_step.py"""

from dataclasses import replace

import pytest
from peft import LoraConfig
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.data.workload import NO_WORK
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.decide import Placement, decide
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.step import Step, why_gathers_not_captured, why_not_captured
from lora_fsdp.sizing.counting import build_on_meta, shape_of
from tests.support.runs import toy_trainer

SHARDED = FsdpSettings(True, False, True, None, True)
OFFLOADED_BASE = FsdpSettings(True, True, True, None, True)
OFFLOADED = FsdpSettings(True, False, True, None, True, activation_offload=True)
GPU = Hardware(ranks=1, has_gpu=True, free=int(80e9))
TWO_GPUS = replace(GPU, ranks=2)
CPU = Hardware.without_gpu(1)
SMALL = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return shape_of(build_on_meta(SMALL), adapter)


def unfused(shape):
    return replace(shape, is_fused=False, why_not_fused="its layers are of another shape")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"hardware": CPU}, "need a GPU"),
        ({"step": "eager"}, "--step eager"),
        ({"step": "fused"}, "--step fused"),
        ({"step": "graph"}, None),
        ({"recomputed": True}, None),
        ({"recomputed": True, "fsdp": SHARDED}, None),
        ({"recomputed": True, "fsdp": OFFLOADED}, "waits in host memory"),
        ({"recomputed": True, "own_checkpointing": True}, "gradient_checkpointing_kwargs"),
        ({"recomputed": True, "is_fused": False}, "the model's own layers"),
        ({"recomputed": True, "drops": True}, "dropout"),
        ({"drops": True}, None),
        ({"is_fused": False}, None),
    ],
)
def test_what_is_captured(small, changed, reason):
    asked = {
        name: changed[name] for name in ("step", "fsdp", "own_checkpointing") if name in changed
    }
    sizes = {name: changed[name] for name in ("is_fused", "drops") if name in changed}
    found = why_not_captured(
        replace(small, **sizes),
        changed.get("hardware", GPU),
        Request(**asked),
        recomputed=changed.get("recomputed", False),
    )
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


@pytest.mark.parametrize(
    ("changed", "hardware", "reason"),
    [
        ({}, TWO_GPUS, None),
        ({}, replace(TWO_GPUS, why_gathers_not_captured="gloo gathers"), "gloo"),
        ({"step": "graph"}, TWO_GPUS, None),
        ({"step": "graph"}, replace(TWO_GPUS, why_gathers_not_captured="gloo gathers"), "gloo"),
        ({}, Hardware.without_gpu(2), "layers are gathered within the step"),
        ({"step": "fused"}, TWO_GPUS, "layers are gathered within the step"),
        ({"step": "compiled"}, TWO_GPUS, "layers are gathered within the step"),
        ({"fsdp": OFFLOADED_BASE}, TWO_GPUS, "fetched from host memory"),
    ],
)
def test_which_gathers_are_captured(changed, hardware, reason):
    found = why_gathers_not_captured(hardware, Request(**{"fsdp": SHARDED, **changed}))
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


def checkpointing_options(trainer):
    trainer.train()
    layers = [m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers
    [options] = {tuple(layer._gradient_checkpointing_func.keywords.items()) for layer in layers}
    return dict(options)


def test_what_is_recomputed_in_a_graph_keeps_no_random_state(tmp_path, monkeypatch):
    """As the Trainer itself switches it on. Nothing is captured on a CPU; the step says so here."""
    plain = toy_trainer(tmp_path / "plain", gradient_checkpointing=True, max_steps=1)
    assert checkpointing_options(plain).get("preserve_rng_state", True)
    monkeypatch.setattr(Step, "is_captured", True)
    monkeypatch.setattr("lora_fsdp.training.placed.CapturedStep", eager_step)
    trainer = toy_trainer(tmp_path / "graph", gradient_checkpointing=True, max_steps=1)
    assert checkpointing_options(trainer) == {"use_reentrant": False, "preserve_rng_state": False}


def eager_step(model, *, largest, gathers, **settings):
    from lora_fsdp.training.step.eager import EagerStep

    return EagerStep(model, **settings)


@pytest.mark.parametrize(
    ("asked", "fused", "fsdp", "steps", "step"),
    [
        ("auto", True, None, 1, "graph"),
        ("auto", True, SHARDED, 1, "graph"),
        ("auto", False, SHARDED, 10**12, "graph"),
        ("auto", False, None, 1, "graph"),
        ("auto", False, None, 10**12, "compiled"),
        ("eager", False, None, 10**12, "eager"),
        ("fused", True, None, 1, "fused"),
        ("graph", True, None, 1, "graph"),
    ],
)
def test_the_step_and_its_reason(small, asked, fused, fsdp, steps, step):
    """What recomputes keeps its state where the model's own layers do: nothing does here."""
    shape = small if fused else unfused(small)
    fsdp = None if fsdp is None else replace(fsdp, activation_checkpointing=False)
    request = Request(step=asked, fsdp=fsdp, resident_layers="auto" if fsdp is None else "none")
    found = decide(shape, replace(NO_WORK, steps=steps), TWO_GPUS if fsdp else GPU, request)
    assert found.step == step
    assert (f"--step {asked}" in found.choice.reason) == (asked != "auto")


def test_gathers_that_no_graph_holds(small):
    """Found out on the machine, where the placement is decided again."""
    hardware = replace(TWO_GPUS, why_gathers_not_captured="gathers differ")
    fsdp = replace(SHARDED, activation_checkpointing=False)
    request = Request(fsdp=fsdp, resident_layers="none")
    for shape, step in ((small, "fused"), (unfused(small), "eager")):
        found = decide(shape, replace(NO_WORK, steps=10**12), hardware, request)
        assert found.step == step
        assert "gathers differ" in found.choice.reason


@pytest.mark.parametrize(
    ("asked", "hardware", "words"),
    [
        ("graph", CPU, "--step graph: CUDA graphs need a GPU. Use --step auto."),
        ("compiled", CPU, "--step compiled: CUDA graphs need a GPU. Use --step auto."),
        ("fused", GPU, "--step fused: its layers are of another shape. Use --step auto."),
    ],
)
def test_a_step_that_cannot_be_is_refused(small, asked, hardware, words):
    shape = small if asked == "graph" else unfused(small)
    with pytest.raises(ArgumentError) as refused:
        decide(shape, NO_WORK, hardware, Request(step=asked))
    assert str(refused.value) == words


def test_a_placement_says_itself(small):
    found = decide(small, NO_WORK, TWO_GPUS, Request(fsdp=SHARDED, resident_layers="1"))
    assert isinstance(found, Placement)
    assert "every rank keeps 1 of 4 layers" in str(found)
    assert "--resident_layers 1" in str(found)
    assert "GB at the peak, predicted" in str(found)
