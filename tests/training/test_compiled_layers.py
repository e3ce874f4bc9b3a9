"""Layers that torch compiles give the plain gradients, with one compilation for all row lengths.

On a CPU, where nothing is captured; tests/gpu captures them too. Needs a C++ compiler.
Run: python -m pytest tests/training/test_compiled_layers.py
"""

import shutil
from contextlib import nullcontext

import pytest
import setuptools  # noqa: F401  torch's compiler imports it, and late it may take stdlib's distutils
import torch

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.training.step.eager import EagerStep
from lora_fsdp.training.step.objectives.supervised import Supervised
from tests.compute.test_decoder_layer import adapted
from tests.gpu.test_fast_step_on_gpu import rows

CPU = torch.device("cpu")


def gradients(packed):
    adapter = AdapterSet.of(packed.model)
    step = EagerStep(
        packed,
        objective=Supervised(),
        adapter=adapter,
        device=CPU,
        autocast=nullcontext,
    )
    loss = step(rows(4), denominator=30)
    return loss.item(), adapter.copy_gradients()


@pytest.mark.filterwarnings("ignore")  # torch's compiler has warnings of its own
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
@pytest.mark.slow
def test_compiled_layers_give_the_plain_gradients(kind, monkeypatch):
    from torch._dynamo import config, reset
    from torch._dynamo.utils import counters

    expected = gradients(PackedModel(adapted(kind)))
    reset()
    counters.clear()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # set by `make test`
    with config.patch(disable=False):
        packed = PackedModel(adapted(kind))
        packed.compile()
        loss, found = gradients(packed)
    assert counters["frames"]["ok"] > 0
    assert not counters["graph_break"]
    assert counters["frames"]["total"] <= 4
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert (found - expected[1]).norm() <= 1e-5 * expected[1].norm()
