"""Many adapters over one pass of the base.

Run: python -m pytest tests/compute/test_shared_pass.py
"""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3Config

from lora_fsdp.adapter.attach import attach_adapters
from lora_fsdp.adapter.ownership import parameters_by_adapter
from lora_fsdp.compute.architectures import windows_of
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.shared_pass import SharedPass, why_apart
from lora_fsdp.data.packing import pack_sequence
from lora_fsdp.data.sampling import target_tree
from lora_fsdp.errors import UnsupportedModelError
from tests.support.several import toy_encoder
from tests.support.tiny import randomise_adapter, tiny_model, toy_table

NAMES = ["default", "member1", "member2"]


def three_adapters(kind="llama"):
    """Of several ranks, scales and places."""
    everywhere = "all-linear"
    some = ["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"]
    settings = [(4, 32, everywhere), (8, 8, some), (2, 4, everywhere)]
    configs = {
        name: LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets,
            fan_in_fan_out=kind == "gpt2",
            task_type="CAUSAL_LM",
        )
        for name, (rank, alpha, targets) in zip(NAMES, settings, strict=True)
    }
    model = attach_adapters(tiny_model(kind), configs, seeds=[1, 2, 3])
    randomise_adapter(model)
    return model


@pytest.fixture(scope="module")
def trees():
    encoder = toy_encoder()
    examples = encoder.encode(encoder.task.examples(toy_table(60)))
    return [target_tree(example) for example in examples]


def gradients(model, log_probs):
    """Of each adapter."""
    model.zero_grad()
    torch.stack([one.sum() for one in log_probs]).sum().backward()
    return {
        name: {key: value.grad.clone() for key, value in own.items() if value.grad is not None}
        for name, own in parameters_by_adapter(model).items()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3", "mistral", "gpt2"])
def test_each_part_is_computed_as_if_it_were_alone(kind, trees):
    model = three_adapters(kind)
    packed = PackedModel(model)
    shared = SharedPass(packed)
    sizes = [(0, 8), (8, 11), (11, 31)]
    sequences = [pack_sequence(trees[a:b], share_prefix=True) for a, b in sizes]
    together = shared.label_log_probs(sequences, NAMES)
    found = gradients(model, together)
    for name, sequence, log_probs in zip(NAMES, sequences, together, strict=True):
        with shared.only(name):
            alone = packed.label_log_probs(sequence)
        torch.testing.assert_close(log_probs, alone, rtol=1e-6, atol=1e-6)
        own = gradients(model, [alone])[name]
        assert own.keys() == found[name].keys()
        for key, gradient in own.items():
            torch.testing.assert_close(found[name][key], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kinds", [["sliding_attention"], ["sliding_attention", "full_attention"]])
def test_windows_are_part_of_each_parts_masks(kinds, trees):
    config = Qwen3Config(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=8,
        use_sliding_window=True, layer_types=[kinds[0], kinds[-1]],
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    configs = {name: LoraConfig(**settings) for name in NAMES}
    model = attach_adapters(base.requires_grad_(False), configs, seeds=[1, 2, 3])
    randomise_adapter(model)
    packed = PackedModel(model)
    packed.windows = windows_of(base, longest=128)
    assert set(packed.windows) == set(kinds)
    shared = SharedPass(packed)
    sequences = [pack_sequence(trees[a : a + 6], share_prefix=True) for a in (0, 6, 12)]
    together = shared.label_log_probs(sequences, NAMES)
    for name, sequence, log_probs in zip(NAMES, sequences, together, strict=True):
        with shared.only(name):
            alone = packed.label_log_probs(sequence)
        torch.testing.assert_close(log_probs, alone, rtol=1e-6, atol=1e-6)
    packed.windows = {}
    without = shared.label_log_probs(sequences, NAMES)
    assert (without[0] - together[0]).abs().max() > 1e-4


@pytest.mark.parametrize("others", [(8, 9), (8, 16), (8, 60)], ids=["short", "alike", "long"])
def test_the_examples_of_one_leave_the_gradients_of_the_others_to_the_bit(others, trees):
    model = three_adapters()
    shared = SharedPass(PackedModel(model))
    first, third = (pack_sequence(trees[a : a + 8], share_prefix=True) for a in (0, 20))

    def of(second):
        return gradients(model, shared.label_log_probs([first, second, third], NAMES))

    one = of(pack_sequence(trees[8:16], share_prefix=True))
    other = of(pack_sequence(trees[slice(*others)][::-1], share_prefix=True))
    assert equal(one["default"], other["default"])
    assert equal(one["member2"], other["member2"])
    assert not equal(one["member1"], other["member1"])


def test_nan_stays_with_its_own_adapter(trees):
    model = three_adapters()
    shared = SharedPass(PackedModel(model))
    sequences = [pack_sequence(trees[a : a + 8], share_prefix=True) for a in (0, 8, 16)]
    before = gradients(model, shared.label_log_probs(sequences, NAMES))
    with torch.no_grad():
        next(iter(parameters_by_adapter(model)["member1"].values())).fill_(float("nan"))
    after = gradients(model, shared.label_log_probs(sequences, NAMES))
    assert equal(before["default"], after["default"])
    assert equal(before["member2"], after["member2"])
    assert any(value.isnan().any() for value in after["member1"].values())


def test_a_part_without_adapter_is_the_base(trees):
    model = three_adapters()
    packed = PackedModel(model)
    shared = SharedPass(packed)
    sequence = pack_sequence(trees[:8], share_prefix=True)
    _, of_base = shared.label_log_probs([sequence, sequence], ["default", None])
    with shared.only(None):
        assert torch.equal(of_base, packed.label_log_probs(sequence))
    with shared.only("default"), model.disable_adapter():
        assert torch.equal(of_base, packed.label_log_probs(sequence))
    packed.undo()
    with model.disable_adapter():
        assert torch.equal(of_base, packed.label_log_probs(sequence))


def test_the_first_values_are_those_of_an_adapter_alone():
    together = parameters_by_adapter(three_adapters())
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    alone = attach_adapters(tiny_model(), {"default": config}, seeds=[3])
    for name, value in parameters_by_adapter(alone)["default"].items():
        if "lora_A" in name:
            assert torch.equal(value, together["member2"][name.replace("default", "member2")])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_share_a_pass_is_named(settings, named):
    assert named in why_apart(LoraConfig(target_modules=["q_proj"], **settings))
    assert why_apart(LoraConfig(target_modules=["q_proj"], r=3, use_rslora=True)) is None


def test_an_adapter_of_the_head_is_refused():
    config = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = attach_adapters(tiny_model(), {"default": config}, seeds=[0])
    with pytest.raises(UnsupportedModelError, match="lm_head cannot share a pass"):
        SharedPass(PackedModel(model))
