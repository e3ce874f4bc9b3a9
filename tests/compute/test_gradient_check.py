"""The live check finds a family whose gradients alone are wrong, and leaves a sound one as it was.

Run: python -m pytest tests/compute/test_gradient_check.py
"""

import pytest
import torch

from lora_fsdp.compute.live_check.gradients import few_of
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import check_packing, why_not_batched, why_not_packed
from lora_fsdp.compute.recurrent import functions, layers
from lora_fsdp.data.packing import Tree
from lora_fsdp.errors import UnsupportedModelError
from tests.compute.test_packed_gradients import random_trees
from tests.support.tiny import adapted_model, randomise_adapter
from tests.support.token_mixers import adapted_family

CPU = torch.device("cpu")
SAMPLE = random_trees(12, prefix=9, seed=2)


def sound(kind="llama"):
    model = adapted_model(kind)
    randomise_adapter(model)
    return model


def detached(hidden, **inputs):
    """A path without gradient where a mask is given."""
    return hidden if inputs["attention_mask"] is None else hidden.detach() * 0.5 + hidden * 0.5


def leaking_backward(hidden, **inputs):
    """A token's gradient reaches the one before it, whosever that is."""
    hidden.register_hook(lambda gradient: gradient + 0.3 * gradient.roll(-1, dims=1))
    return hidden


def cut_by_a_window(hidden, **inputs):
    """No gradient from further than 32 tokens along the sequence."""
    hidden.register_hook(
        lambda gradient: gradient * (torch.arange(gradient.shape[1]) < 32)[:, None]
    )
    return hidden


def by_position(hidden, **inputs):
    """A factor of the position along the sequence."""
    hidden.register_hook(lambda gradient: gradient * (1 + 0.01 * gradient.shape[1]))
    return hidden


def broken(change):
    """A model whose second layer computes the same, and goes backward otherwise."""
    model = sound()
    layer = model.get_base_model().model.layers[1]
    forward = layer.forward

    def changed(hidden, **inputs):
        output = forward(hidden, **inputs)
        return change(output, **inputs) if output.requires_grad else output

    layer.forward = changed
    return model


@pytest.mark.parametrize("sample", [SAMPLE, ()], ids=["its own texts", "short texts"])
@pytest.mark.parametrize("change", [detached, leaking_backward, cut_by_a_window, by_position])
def test_gradients_that_alone_are_wrong(change, sample):
    if change is cut_by_a_window and not sample:
        pytest.skip("two short texts are no longer than the window")
    model = broken(change)
    reason = why_not_packed(PackedModel(model), device=CPU, sample=sample)
    assert reason.startswith("LlamaForCausalLM computes the gradients of packed examples (")
    assert "of their size in base_model.model.model.layers." in reason
    with pytest.raises(UnsupportedModelError, match=r"the gradients of.*--packing auto gives"):
        check_packing(PackedModel(model), device=CPU, sample=sample)
    model.requires_grad_(False)
    assert why_not_packed(PackedModel(model), device=CPU, sample=sample) is None


def test_gradients_that_padding_changes():
    model = broken(by_position)
    reason = why_not_batched(PackedModel(model), device=CPU, sample=SAMPLE)
    assert "the gradients of sequences that are filled up to one length" in reason
    model.requires_grad_(False)
    assert why_not_batched(PackedModel(model), device=CPU, sample=SAMPLE) is None


def without_gradient_of_the_state(own, tree):
    """A recurrence in which no gradient goes from a branch into what it grew from."""

    def cut(*tensors, initial_state=None, **settings):
        state = None if initial_state is None else initial_state.detach()
        return own(*tensors, initial_state=state, **settings)

    return functions.delta_rule(cut, tree)


def test_a_state_without_its_gradient(monkeypatch):
    name = "torch_chunk_gated_delta_rule"
    monkeypatch.setitem(layers.ALONG_TREE, name, without_gradient_of_the_state)
    model = adapted_family("qwen3_next")
    reason = why_not_packed(PackedModel(model), device=CPU, sample=SAMPLE)
    assert "computes the gradients of packed examples" in reason
    model.requires_grad_(False)
    assert why_not_packed(PackedModel(model), device=CPU, sample=SAMPLE) is None


class Forward(torch.autograd.Function):
    """Whose backward nobody wrote."""

    @staticmethod
    def forward(context, hidden):
        return hidden.clone()


def test_a_backward_that_there_is_not():
    def one_way(hidden, **inputs):
        return hidden if inputs["attention_mask"] is None else Forward.apply(hidden)

    reason = why_not_packed(PackedModel(broken(one_way)), device=CPU, sample=SAMPLE)
    assert reason.startswith("LlamaForCausalLM has no gradients of packed examples (12 of this run")
    model = broken(lambda hidden, **inputs: Forward.apply(hidden))
    message = r"LlamaForCausalLM cannot be trained: no backward goes through it \(NotImpl"
    with pytest.raises(UnsupportedModelError, match=message):
        why_not_batched(PackedModel(model), device=CPU, sample=SAMPLE)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sound_model_stays_as_it_was(kind, recomputed):
    model = sound(kind)
    packed = PackedModel(model)
    packed.is_recomputed = recomputed
    kept = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept[name] = parameter.grad = torch.full_like(parameter, 3.0)
    for check in (why_not_packed, why_not_batched):
        assert check(packed, device=CPU, sample=SAMPLE) is None
    for name, parameter in model.named_parameters():
        assert parameter.grad is kept.get(name)
        assert name not in kept or (parameter.grad == 3.0).all()
    assert model.training
    assert not packed.patches.made


def test_a_sample_for_gradients_is_small():
    trees = [Tree(list(range(400)), [[1, 2]]) for _ in range(9)]
    assert len(few_of(trees)) == 2
    assert few_of([Tree(list(range(4000)), [[1, 2]]), *trees]) == []
