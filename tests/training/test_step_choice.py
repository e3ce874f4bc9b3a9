"""Which steps a CUDA graph may hold. Run: python -m pytest tests/training/test_step_choice.py"""

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.compute.fusing import Fusing
from lora_fsdp.errors import ArgumentError
from lora_fsdp.training.place import TrainingPlan
from lora_fsdp.training.step.choice import (
    choose_step,
    why_gathers_stay_out,
    why_not_captured,
)
from tests.support.runs import toy_trainer
from tests.support.tiny import adapted_model

SHARDED = FsdpSettings(True, False, True, None, True)
OFFLOADED_BASE = FsdpSettings(True, True, True, None, True)
OFFLOADED = FsdpSettings(True, False, True, None, True, activation_offload=True)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "need a GPU"),
        ({"step": "eager"}, "--step eager"),
        ({"step": "fused"}, "--step fused"),
        ({"step": "graph"}, None),
        ({"recomputed": True}, None),
        ({"recomputed": True, "settings": SHARDED}, None),
        ({"recomputed": True, "settings": OFFLOADED}, "waits in host memory"),
        ({"recomputed": True, "kwargs": {"use_reentrant": True}}, "gradient_checkpointing_kwargs"),
        ({"recomputed": True, "is_fused": False}, "the model's own layers"),
        ({"recomputed": True, "dropout": 0.1}, "dropout"),
        ({"dropout": 0.1}, None),
        ({"is_fused": False}, None),
    ],
)
def test_what_is_captured(changed, reason):
    case = {"device": "cuda", "settings": None, "kwargs": None, "dropout": 0.0, "step": "auto"}
    case |= changed
    model = adapted_model("llama")
    model.peft_config["default"].lora_dropout = case["dropout"]
    # The arguments' own device is this machine's.
    arguments = SimpleNamespace(
        device=torch.device(case["device"]),
        gradient_checkpointing_kwargs=case["kwargs"],
        step=case["step"],
    )
    found = why_not_captured(
        model,
        arguments,
        case["settings"],
        is_fused=case.get("is_fused", True),
        recomputed=case.get("recomputed", False),
    )
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"settings": None}, None),
        ({}, "which only --step graph captures"),
        ({"step": "graph"}, None),
        ({"device": "cpu"}, "layers are gathered within the step"),
        ({"step": "fused"}, "layers are gathered within the step"),
        ({"step": "compiled"}, "layers are gathered within the step"),
        ({"settings": OFFLOADED_BASE}, "fetched from host memory"),
        ({"resident": "all"}, None),
    ],
)
def test_which_gathers_are_captured(changed, reason):
    """Nothing is tried where one process runs; tests/gpu/test_two_gpus.py tries."""
    case = {"device": "cuda", "settings": SHARDED, "step": "auto", "resident": "auto"} | changed
    arguments = SimpleNamespace(
        device=torch.device(case["device"]),
        step=case["step"],
        resident_layers=case["resident"],
    )
    found = why_gathers_stay_out(arguments, case["settings"])
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


def checkpointing_options(trainer):
    trainer.train()
    layers = [m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers
    [options] = {tuple(layer._gradient_checkpointing_func.keywords.items()) for layer in layers}
    return dict(options)


def test_what_is_recomputed_in_a_graph_keeps_no_random_state(tmp_path, monkeypatch):
    """As the Trainer itself switches it on. Nothing is captured on a CPU; the plan says so here."""
    plain = toy_trainer(tmp_path / "plain", gradient_checkpointing=True, max_steps=1)
    assert checkpointing_options(plain).get("preserve_rng_state", True)
    monkeypatch.setattr(TrainingPlan, "is_captured", True)
    trainer = toy_trainer(tmp_path / "graph", gradient_checkpointing=True, max_steps=1)
    assert checkpointing_options(trainer) == {"use_reentrant": False, "preserve_rng_state": False}


@pytest.mark.parametrize(
    ("asked", "fused", "why_not", "seconds", "step"),
    [
        ("auto", True, None, 1.0, "graph"),
        ("auto", True, "layers are gathered within the step", 1.0, "fused"),
        ("auto", False, "layers are gathered within the step", 1e4, "eager"),
        ("auto", False, None, 1.0, "graph"),
        ("auto", False, None, 1e4, "compiled"),
        ("eager", False, None, 1e4, "eager"),
        ("fused", True, None, 1.0, "fused"),
        ("graph", False, None, 1.0, "graph"),
    ],
)
def test_the_step_and_its_reason(asked, fused, why_not, seconds, step):
    found, reason = choose_step(
        SimpleNamespace(step=asked),
        fusing=Fusing(["a layer"], "") if fused else Fusing(reason="layers of another shape"),
        why_not_captured=why_not,
        seconds=seconds,
    )
    assert found == step
    assert (f"--step {asked}" in reason) == (asked != "auto")
    assert why_not is None or why_not in reason


def test_a_graph_that_cannot_be_is_refused():
    with pytest.raises(ArgumentError, match=r"gathered within the step\. Use --step auto"):
        choose_step(
            SimpleNamespace(step="graph"),
            fusing=Fusing(["a layer"], ""),
            why_not_captured="layers are gathered within the step",
            seconds=1.0,
        )
