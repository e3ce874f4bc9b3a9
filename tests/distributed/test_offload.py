"""Recomputed activations, also kept in host memory, and parameters offloaded: the same gradients.

Run: python -m pytest tests/distributed/test_offload.py
"""

import pytest
import torch

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import base_model, decoder_layers
from lora_fsdp.compute.decoder_layer import FusedLayer
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import Tree, pack_sequence
from lora_fsdp.training.recomputing import enable_checkpointing
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run
from tests.support.tiny import adapted_model, randomise_adapter

SETTINGS = {
    "kept": FsdpSettings(True, False, False, None, True),
    "recomputed": FsdpSettings(True, False, True, None, True),
    "offloaded": FsdpSettings(True, False, True, None, True, activation_offload=True),
}


def gradients(setting, *, fused, monkeypatch=None):
    """Of one packed row; and what was computed and moved to host memory on the way."""
    counts = {"layers": 0, "packed": 0}
    model = adapted_model("llama")
    randomise_adapter(model)
    packed, layers = PackedModel(model), decoder_layers(base_model(model))
    if fused:
        assert packed.fuse(layers).is_fused
    if SETTINGS[setting].activation_checkpointing:
        arguments = FineTuningArguments(output_dir="unused", use_cpu=True)
        enable_checkpointing(packed, arguments, SETTINGS[setting])
    model.train()
    original = FusedLayer.compute if fused else type(layers[0].mlp).forward

    def counted(self, *arguments, **options):
        counts["layers"] += 1
        return original(self, *arguments, **options)

    monkeypatch.setattr(FusedLayer if fused else type(layers[0].mlp), *_named(fused, counted))
    pack = torch.autograd.graph.save_on_cpu.__init__

    def counted_pack(self, *arguments, **options):
        counts["packed"] += 1
        return pack(self, *arguments, **options)

    monkeypatch.setattr(torch.autograd.graph.save_on_cpu, "__init__", counted_pack)
    texts = torch.arange(5, 29).view(2, 12).tolist()
    row = pack_sequence([Tree(text[:6], [text[6:]]) for text in texts], share_prefix=False)
    (-packed.label_log_probs(row).sum()).backward()
    monkeypatch.undo()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return found, counts


def _named(fused, function):
    return ("compute" if fused else "forward"), function


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("setting", ["recomputed", "offloaded"])
def test_gradients_are_those_of_kept_activations(fused, setting, monkeypatch):
    kept, at_first = gradients("kept", fused=fused, monkeypatch=monkeypatch)
    found, counts = gradients(setting, fused=fused, monkeypatch=monkeypatch)
    assert len(kept) == 42
    for name, gradient in kept.items():
        assert gradient.abs().max() > 0
        assert torch.equal(found[name], gradient), name
    # Each of the three layers once, and once more in backward: it really is recomputed.
    assert at_first == {"layers": 3, "packed": 0}
    assert counts == {"layers": 6, "packed": 3 if setting == "offloaded" else 0}


@pytest.mark.distributed
def test_the_shipped_yaml_rehearsed(tmp_path):
    """On CPUs the shards are in host memory anyway: it trains as the rehearsal's own YAML does."""
    plain = launch_environment("fsdp2_cpu.yaml")
    offload = launch_environment("fsdp2_offload.yaml") | {
        "ACCELERATE_USE_CPU": "True",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true",
    }
    expected = run_ranks(toy_run, tmp_path / "plain", environment=plain)
    found = run_ranks(toy_run, tmp_path / "offload", environment=offload)
    assert found[0]["groups"] == expected[0]["groups"]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
    # Not to the bit: where nothing is recomputed, the last layer runs at label positions only.
    assert found[0]["losses"] == pytest.approx(expected[0]["losses"], rel=1e-6)
