"""A model's sizes are counted on the meta device: the same as of a model with numbers.

Run: python -m pytest tests/placement/test_shape.py
"""

import pytest
import torch
from peft import LoraConfig
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.base.layers import decoder_layers
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.errors import TargetModulesError
from lora_fsdp.sizing.counting import build_on_meta, shape_of
from tests.support.tiny import CONFIGS, tiny_model
from tests.support.token_mixers import FAMILIES, family_config

ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def kept_by_autograd(config, adapter, *, tokens, fuse):
    """Bytes that a forward on the CPU really keeps, weights and mask not counted."""
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = attach_adapter(base, adapter)
    if fuse:
        assert PackedModel(base).fuse().is_fused
    mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16)
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers(), mask]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            input_ids=torch.zeros(1, tokens, dtype=torch.int64),
            attention_mask=mask,
            position_ids=torch.arange(tokens)[None],
            use_cache=False,
            logits_to_keep=1,
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["qv", "all"])
def test_saved_bytes_are_those_of_a_real_forward(fuse, targets):
    adapter = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    shape = shape_of(build_on_meta(LLAMA), adapter, stay=None if fuse else "--step eager")
    short = kept_by_autograd(LLAMA, adapter, tokens=128, fuse=fuse)
    long = kept_by_autograd(LLAMA, adapter, tokens=384, fuse=fuse)
    assert shape.is_fused == fuse
    assert shape.saved_bytes(384, recomputed=False) - shape.saved_bytes(
        128, recomputed=False
    ) == pytest.approx(long - short, rel=0.02)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_parameters_are_those_of_the_model(kind):
    base = tiny_model(kind)
    adapter = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2"
    )
    shape = shape_of(build_on_meta(base.config), adapter)
    assert shape.parameters == sum(p.numel() for p in base.parameters())
    assert shape.layers == len(decoder_layers(base))
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert (shape.head_parameters == 0) == tied
    assert shape.base_bytes(quantized=False) == 2 * shape.parameters
    assert shape.saved_per_token > 0


def test_adapter_parameters():
    shape = shape_of(build_on_meta(LLAMA), ADAPTER)
    of_layer = 4 * (128 + 128) + 4 * (128 + 64)  # q is 128 to 128, v 128 to 64
    assert shape.adapter_parameters == 3 * of_layer
    assert shape.adapted_linears == 3 * 2
    assert shape.adapted_width == 3 * (128 + 128 + 128 + 64)


def test_four_bits_shrink_the_layers_only():
    shape = shape_of(build_on_meta(LLAMA), ADAPTER)
    linear = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 344
    assert shape.linear_parameters == linear
    norms = 2 * 128
    layer = 2 * norms + linear * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert shape.layer_bytes(quantized=True) == int(layer)
    outside = 2 * (2 * 512 * 128 + 128)
    assert shape.base_bytes(quantized=True) == outside + 3 * int(layer)


def test_the_asked_adapter_is_left_as_it_was():
    before = ADAPTER.to_dict()
    shape_of(build_on_meta(LLAMA), ADAPTER)
    assert ADAPTER.to_dict() == before


def test_experts_are_estimated_and_said():
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    targets = ["q_proj", "v_proj"]
    shape = shape_of(
        build_on_meta(config), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    )
    assert shape.saved_per_token > 0
    assert not shape.is_fused


def test_targets_that_match_nothing():
    adapter = LoraConfig(r=4, target_modules=["wq"], task_type="CAUSAL_LM")
    with pytest.raises(TargetModulesError, match="wq"):
        shape_of(build_on_meta(LLAMA), adapter)


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next", "lfm2", "bloom"])
def test_models_that_cannot_be_packed_are_counted_as_any_text(family):
    """Also those that ask tensors whether there is anything to mask, which have no numbers here."""
    config, targets = family_config(family), FAMILIES[family][1]
    adapter = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    shape = shape_of(build_on_meta(config), adapter, stay="--packing never", packed=False)
    assert not shape.note
    assert shape.saved_per_token > 2 * shape.itemsize * shape.hidden_size
    assert shape.saved_per_pair >= 0
