"""What a packed model changes on a model is listed, and put back.

Run: python -m pytest tests/compute/test_patches.py
"""

from pathlib import Path

import pytest
import torch

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import check_packing
from lora_fsdp.data.packing import Tree, pack_sequence
from lora_fsdp.training.recomputing import enable_checkpointing
from tests.support.tiny import ToyTask, adapted_model, randomise_adapter, tiny_tokenizer, toy_table

CPU = torch.device("cpu")
OFFLOADED = FsdpSettings(True, False, True, None, True, activation_offload=True)


def attributes(model):
    """Every module's class, forward, own attributes, and what its dictionaries (hooks) hold."""
    found = {}
    for name, module in model.named_modules():
        own = dict(vars(module))
        inner = {key: dict(value) for key, value in own.items() if isinstance(value, dict)}
        found[name] = (type(module), module.forward, own, inner)
    return found


def changed(before, after):
    """Names of modules, with the attributes that are others."""
    assert before.keys() == after.keys()
    found = []
    for name, (kind, forward, own, inner) in before.items():
        kind_now, forward_now, own_now, inner_now = after[name]
        same = kind is kind_now and forward == forward_now and inner == inner_now
        for key in own.keys() | own_now.keys():
            same = same and own.get(key) is own_now.get(key) and (key in own) == (key in own_now)
        if not same:
            found.append(name)
    return found


def sequence():
    trees = [Tree([5, 6, 7, 8 + n], [[9, n + 20, 0]]) for n in range(3)]
    return pack_sequence(trees, share_prefix=True)


def fuse(packed):
    assert packed.fuse().is_fused
    packed.join_weights()
    packed.shortened_last_layer = True


def recompute(packed, settings=None):
    fuse(packed)
    packed.shortened_last_layer = False
    enable_checkpointing(packed, FineTuningArguments(output_dir="unused", use_cpu=True), settings)


def offload(packed):
    recompute(packed, OFFLOADED)


def chunk(packed):
    check_packing(packed, device=CPU)
    assert packed.chunked_head


WAYS = {
    "eager": (lambda packed: None, ""),
    "fused": (fuse, "LlamaDecoderLayer.forward (3 times): fused layers"),
    "chunked head": (chunk, ""),
    "recomputed": (recompute, "gradient_checkpointing (3 times): activations are recomputed"),
    "offloaded": (offload, "waits in host memory"),
    "compiled": (PackedModel.compile, "_compiled_call_impl (3 times): torch compiles the layers"),
}


@pytest.mark.parametrize("way", WAYS)
def test_everything_is_listed_and_put_back(way):
    model = adapted_model()
    randomise_adapter(model)
    model.train()
    [patch, line] = WAYS[way]
    before, expected = attributes(model), PackedModel(model).label_log_probs(sequence())
    with PackedModel(model) as packed:
        patch(packed)
        assert line in str(packed.patches)
        assert bool(line) == bool(packed.patches.made) == bool(changed(before, attributes(model)))
        listed = {name for name, module in model.named_modules() if is_target(packed, module)}
        assert set(changed(before, attributes(model))) <= listed
        patched = attributes(model)
        found = packed.label_log_probs(sequence(), chunk_above=0)
        assert torch.allclose(found, expected, atol=1e-5)
        found.sum().backward()
        assert not changed(patched, attributes(model))  # what was exchanged for the forward alone
    assert not changed(before, attributes(model))
    assert not packed.patches.made
    assert not packed.fusing.is_fused
    assert torch.equal(PackedModel(model).label_log_probs(sequence()), expected)


def is_target(packed, module):
    return any(patch.target is module for patch in packed.patches.made)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = adapted_model()
    packed = PackedModel(model)
    fuse(packed)
    packed.chunked_head = True
    before = attributes(model)
    broken = sequence()
    broken.tokens[0, 0] = 400  # no token of the vocabulary
    with pytest.raises(IndexError):
        packed.label_log_probs(broken, chunk_above=0)
    assert not changed(before, attributes(model))
    assert packed.fusing.layers[-1].only_at is None


def test_what_a_training_run_changed_is_put_back(tmp_path: Path):
    model, task = adapted_model(), ToyTask().bind(toy_table())
    before = attributes(model)
    trainer = LoraTrainer(
        model=model,
        args=FineTuningArguments(output_dir=str(tmp_path), max_steps=1, save_strategy="no"),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(toy_table()),
        max_length=128,
    )
    assert "zero_grad: gradients are dropped without" in str(trainer.packed.patches)
    assert "_is_accelerate_prepared: accelerate must not" in str(trainer.packed.patches)
    trainer.packed.undo()
    assert not changed(before, attributes(model))
