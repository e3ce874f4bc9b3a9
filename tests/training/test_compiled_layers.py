"""Layers that torch compiles give the plain gradients, with one compilation for all row lengths.

On a CPU, where nothing is captured; tests/gpu captures them too. Needs a C++ compiler.
Run: python -m pytest tests/training/test_compiled_layers.py
"""

import shutil
from contextlib import nullcontext

import pytest
import torch

from lora_fsdp.adapter.attach import trainable_parameters
from lora_fsdp.base.layers import base_model, decoder_layers
from lora_fsdp.compute.compiled_layers import compile_layers
from lora_fsdp.compute.label_head import RowComputation
from lora_fsdp.distributed.replication import ReplicatedParameters
from lora_fsdp.training.step.eager import EagerStep
from tests.compute.test_decoder_layer import adapted
from tests.gpu.test_fast_step_on_gpu import rows

CPU = torch.device("cpu")


def gradients(model):
    adapter = ReplicatedParameters(trainable_parameters(model))
    step = EagerStep(
        model,
        computation=RowComputation(torch.float32),
        adapter=adapter,
        device=CPU,
        autocast=nullcontext,
    )
    loss = step(rows(4), label_tokens=30)
    return loss.item(), adapter.copy_gradients()


@pytest.mark.filterwarnings("ignore")  # torch's compiler has warnings of its own
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_compiled_layers_give_the_plain_gradients(kind, monkeypatch):
    from torch._dynamo import config, reset
    from torch._dynamo.utils import counters

    expected = gradients(adapted(kind))
    reset()
    counters.clear()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # set by `make test`
    with config.patch(disable=False):
        model = adapted(kind)
        compile_layers(decoder_layers(base_model(model)))
        loss, found = gradients(model)
    assert counters["frames"]["ok"] > 0
    assert not counters["graph_break"]
    assert counters["frames"]["total"] <= 4
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert (found - expected[1]).norm() <= 1e-5 * expected[1].norm()
