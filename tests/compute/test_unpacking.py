"""Packed weights unpacked ahead of their use: the same numbers, each block once a use.

On a CPU they are unpacked in turn; on a stream of their own in tests/gpu/test_memory_on_gpu.py.

Run: python -m pytest tests/compute/test_unpacking.py
"""

from itertools import pairwise

import pytest
import torch
from peft import LoraConfig

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.arguments import FineTuningArguments, ModelArguments
from lora_fsdp.base.streaming import open_base
from lora_fsdp.compute import unpacking
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.unpacking import QuantizedBlock
from lora_fsdp.data.packing import Tree, pack_sequence
from lora_fsdp.training.recomputing import enable_checkpointing
from tests.support.adapters import save_base
from tests.support.tiny import randomise_adapter

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
TARGETS = {
    "q, v": ["q_proj", "v_proj"],
    "all": "all-linear",
    # The first layer's attention has no gradient to compute then.
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


def fused(folder, *, targets, recomputed=False):
    """A base in 4 bits with an adapter, and fused layers."""
    stored = open_base(ModelArguments(str(folder), load_in_4bit=True, dtype="float32"), device=CPU)
    config = LoraConfig(r=4, target_modules=TARGETS[targets], task_type="CAUSAL_LM")
    torch.manual_seed(2)
    model = attach_adapter(stored.model, config, stored=stored)
    randomise_adapter(model)
    packed = PackedModel(model)
    fusing = packed.fuse(filled_copy=stored.filled_copy)
    assert fusing.is_fused, fusing.reason
    stored.fill([stored.model], device=CPU, keep_on=CPU)
    if recomputed:
        enable_checkpointing(packed, FineTuningArguments(output_dir="unused"), None)
    model.train()
    return packed


def gradients(packed):
    texts = torch.arange(5, 29).view(2, 12).tolist()
    sequence = pack_sequence([Tree(text[:6], [text[6:]]) for text in texts], share_prefix=True)
    packed.model.zero_grad()
    (-packed.label_log_probs(sequence).sum()).backward()
    return {name: p.grad.clone() for name, p in trainable_parameters(packed.model).items()}


@pytest.fixture
def unpacked(monkeypatch):
    """The blocks that were unpacked, in turn, and whether ahead of their use."""
    seen, unpack = [], QuantizedBlock.unpack

    def noted(self, out=None):
        seen.append((self, out is not None))
        return unpack(self, out)

    monkeypatch.setattr(QuantizedBlock, "unpack", noted)
    return seen


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_the_same_gradients_and_no_block_more_often(targets, recomputed, tmp_path, unpacked):
    save_base(tmp_path)
    packed = fused(tmp_path, targets=targets, recomputed=recomputed)
    expected = gradients(packed)
    at_use = list(unpacked)
    assert not any(ahead for _, ahead in at_use)
    packed.unpack_ahead(recomputed=recomputed)
    for _ in range(2):
        unpacked.clear()
        found = gradients(packed)
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
        assert [block for block, _ in unpacked] == [block for block, _ in at_use]
    blocks = [layer.packed_blocks() for layer in packed.fusing.layers]
    order = {block: index for layer in blocks for index, block in enumerate(layer)}
    # Near the end, as these layers are, queries, keys and values with what follows attention only.
    ahead = [order[block] for block, is_ahead in unpacked if is_ahead]
    in_backward = 0 if targets == "mlp" else len(packed.fusing.layers) - (targets == "q, v")
    in_forward = len(packed.fusing.layers) * (2 if recomputed else 1)
    assert ahead.count(1) == in_forward
    assert ahead.count(0) >= in_backward


def test_two_blocks_take_more_than_the_largest_only_where_activations_are_to_come(
    tmp_path, unpacked, monkeypatch
):
    monkeypatch.setattr(unpacking, "_NARROW_LAYERS", 1)
    save_base(tmp_path)
    packed = fused(tmp_path, targets="q, v")
    packed.unpack_ahead(recomputed=False)
    gradients(packed)
    *_, narrow = (layer.packed_blocks() for layer in packed.fusing.layers)
    largest = max(block.bytes_unpacked for block in narrow)
    for (before, _), (block, ahead) in pairwise(unpacked):
        if before is not block:  # the last of forward is the first of backward
            fits = before.bytes_unpacked + block.bytes_unpacked <= largest
            assert ahead == (fits or not {before, block} & set(narrow))
    assert {ahead for block, ahead in unpacked if block in narrow} == {True, False}


def test_a_forward_without_backward_is_forgotten(tmp_path, unpacked):
    save_base(tmp_path)
    packed = fused(tmp_path, targets="q, v")
    packed.unpack_ahead(recomputed=False)
    expected = gradients(packed)
    once = [block for block, _ in unpacked]
    sequence = pack_sequence([Tree([5, 6, 7], [[8, 9]])], share_prefix=True)
    packed.label_log_probs(sequence)
    with torch.no_grad():
        packed.label_log_probs(sequence)
    unpacked.clear()
    for name, gradient in gradients(packed).items():
        assert torch.equal(gradient, expected[name]), name
    assert [block for block, _ in unpacked] == once


def test_another_block_than_expected(tmp_path):
    """A forward that was broken off leaves one that nobody asks for."""
    save_base(tmp_path)
    packed = fused(tmp_path, targets="q, v")
    expected = gradients(packed)
    packed.unpack_ahead(recomputed=False)
    some = packed.fusing.layers[0].output
    numbers = some.unpacking.in_forward(some.packed, has_backward=True)
    assert torch.equal(numbers, some.packed.unpack())
    for name, gradient in gradients(packed).items():
        assert torch.equal(gradient, expected[name]), name
