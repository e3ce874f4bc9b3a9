"""Which parameter is whose, and the adapters of a run in one block of gradients.

Run: python -m pytest tests/adapter/test_adapter_set.py
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.adapter.ownership import parameters_by_adapter, trainable_parameters
from lora_fsdp.errors import AdapterVerificationError, ArgumentError
from tests.support.adapters import randomise_adapter
from tests.support.tiny import adapted_model, tiny_model


def two_adapters():
    """A small one on all layers and a larger one on two projections, both trained."""
    model = adapted_model()
    second = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    return model


def requiring_gradients(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestOwnership:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"use_dora": True},
            {"lora_bias": True},
            {"bias": "all"},
            {"bias": "lora_only"},
            {"modules_to_save": ["lm_head"]},
            {"target_modules": ["embed_tokens", "q_proj"]},
            {"trainable_token_indices": [1, 2]},
            {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        ],
        ids=lambda settings: "-".join(settings) or "plain",
    )
    def test_all_that_peft_trains_is_the_adapters(self, settings):
        with_biases = "bias" in settings or "lora_bias" in settings
        model = tiny_model("gpt2" if with_biases else "llama")
        config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings})
        config.fan_in_fan_out = with_biases
        model = get_peft_model(model, config, adapter_name="my-adapter")
        found = parameters_by_adapter(model)
        assert found.keys() == {"my-adapter"}
        assert found["my-adapter"].keys() == requiring_gradients(model)
        assert list(trainable_parameters(model)) == [
            name for name, parameter in model.named_parameters() if parameter.requires_grad
        ]

    def test_of_two_adapters(self):
        model = two_adapters()
        found = parameters_by_adapter(model)
        assert list(found) == ["default", "second"]
        for name, parameters in found.items():
            assert all(f".{name}." in parameter for parameter in parameters)
        assert {*found["default"], *found["second"]} == requiring_gradients(model)

    def test_an_adapter_that_is_not_trained_is_left_out(self):
        model = two_adapters()
        model.set_adapter("second")
        assert list(parameters_by_adapter(model)) == ["second"]
        model.requires_grad_(False)
        assert parameters_by_adapter(model) == {}

    def test_a_trainable_parameter_of_no_adapter_is_refused(self):
        model = adapted_model()
        model.get_base_model().model.norm.weight.requires_grad_()
        with pytest.raises(ArgumentError, match=r"model\.norm\.weight is trainable and belongs to"):
            parameters_by_adapter(model)

    def test_a_frozen_parameter_of_an_adapter_is_refused(self):
        model = adapted_model()
        frozen = next(name for name in trainable_parameters(model) if "lora_A" in name)
        model.get_parameter(frozen).requires_grad_(False)
        with pytest.raises(ArgumentError, match="is frozen and belongs to the adapter 'default'"):
            parameters_by_adapter(model)


class TestTwoAdapters:
    def test_have_disjoint_slices_of_one_block(self):
        model = two_adapters()
        adapters = AdapterSet.of(model)
        adapters.zero_gradients()
        sizes = {
            name: sum(value.numel() for value in adapter.parameters.values())
            for name, adapter in adapters.adapters.items()
        }
        assert adapters.gradients.numel() == sum(sizes.values())
        for count, (name, adapter) in enumerate(adapters.adapters.items(), start=1):
            assert adapter.gradients.numel() == sizes[name]
            for value in adapter.parameters.values():
                value.grad += float(count)
        expected = [1.0] * sizes["default"] + [2.0] * sizes["second"]
        assert adapters.gradients.tolist() == expected

    def test_are_clipped_each_by_its_own_norm(self):
        adapters = AdapterSet.of(two_adapters())
        default, second = adapters.adapters.values()
        default.gradients.fill_(1e-6)
        second.gradients.fill_(1.0)
        whole, untouched = adapters.gradient_norm(), default.gradients.clone()
        torch.testing.assert_close(adapters.clip_gradients(1.0), whole)
        assert torch.equal(default.gradients, untouched)
        assert second.gradient_norm().item() == pytest.approx(1.0, rel=1e-5)

    def test_are_dropped_together(self):
        adapters = AdapterSet.of(two_adapters())
        adapters.zero_gradients()
        adapters.drop_gradients()
        assert all(parameter.grad is None for parameter in adapters.parameters.values())


class TestMoved:
    def test_an_adapter_that_does_not_move_is_named(self):
        model = adapted_model()
        adapters = AdapterSet.of(model)
        with pytest.raises(AdapterVerificationError, match=r"21 of 21 lora_B did not move"):
            adapters.check_moved()
        randomise_adapter(model)
        adapters.check_moved()

    def test_one_that_does_not_move_is_named(self):
        model = adapted_model()
        adapters = AdapterSet.of(model)
        randomise_adapter(model)
        name, parameter = next((n, p) for n, p in trainable_parameters(model).items() if "B" in n)
        parameter.data.zero_()
        with pytest.raises(AdapterVerificationError, match="1 of 21") as caught:
            adapters.check_moved()
        assert name in str(caught.value)


def test_fingerprint_sees_one_bit():
    adapters = AdapterSet.of(adapted_model())
    before = adapters.fingerprint()
    parameter = next(iter(adapters.parameters.values()))
    parameter.data.view(torch.int32).view(-1)[0] ^= 1
    assert adapters.fingerprint() != before
