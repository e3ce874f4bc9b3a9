"""One example a sequence: losses, gradients and scores are those of plain one-by-one PEFT.

Run: python -m pytest tests/compute/test_examples_apart.py
"""

import pytest
import torch
from torch.nn import functional

from lora_fsdp.compute.architectures import check_architecture, why_apart
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import why_not_batched, why_not_packed
from lora_fsdp.data.packing import Batch, Packing, Tree
from lora_fsdp.errors import UnsupportedModelError
from tests.compute.test_packed_gradients import (
    one_by_one,
    random_trees,
    relative_error,
    take_gradients,
)
from tests.support.tiny import adapted_model, randomise_adapter
from tests.support.token_mixers import FAMILIES, FOLLOWING_TREES, WINDOWED, adapted_family

CPU = torch.device("cpu")
#: Whose examples share a sequence: a mask keeps them apart, and states follow the tree.
MASKED = ("deepseek_v32", *FOLLOWING_TREES)


def model_of(family):
    if family != "llama":
        return adapted_family(family)
    model = adapted_model("llama")
    randomise_adapter(model)
    return model


def gradients_apart(model, trees, packing, *, chunked=False):
    packed = PackedModel(model)
    packed.packing = packing
    total = sum(len(answer) for tree in trees for answer in tree.answers)
    sequence = Batch(trees).lay()
    log_probs = packed.label_log_probs(sequence, chunk_above=0 if chunked else 10_000)
    loss = -log_probs.sum() / total
    loss.backward()
    return loss.item(), take_gradients(model)


@pytest.mark.parametrize("family", ["llama", *FAMILIES, *WINDOWED])
def test_gradients_equal_one_by_one(family):
    model = model_of(family)
    trees = random_trees(6, prefix=12, seed=3)
    expected, reference = one_by_one(model, trees)
    for packing in (Packing.BATCHED, Packing.SINGLE):
        loss, gradients = gradients_apart(model, trees, packing)
        assert loss == pytest.approx(expected, rel=2e-6)
        assert relative_error(gradients, reference) < 2e-6


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MASKED])
def test_these_are_not_packed_and_can_be_batched(family):
    """By what their settings say; and the live check finds it on the model, whatever they say."""
    packed = PackedModel(model_of(family))
    check_architecture(packed.base, longest=512)
    assert why_apart(packed.base) is not None
    trees = random_trees(6, prefix=12, seed=3)
    assert why_not_packed(packed, device=CPU, sample=trees) is not None
    assert why_not_batched(packed, device=CPU, sample=trees) is None


@pytest.mark.parametrize("family", ["llama", "mamba2", "qwen3_next", "bloom"])
@pytest.mark.parametrize("packing", [Packing.BATCHED, Packing.SINGLE])
def test_answers_score_as_they_would_alone(family, packing):
    """Of several answers to a prompt each has a sequence of its own."""
    model = model_of(family).eval()
    answers = [[11, 0], [12, 13, 0], [14]]
    trees = [Tree([3, 4, *range(20 + i, 25 + 3 * i)], answers, [1.0, 0.0, -1.0]) for i in range(3)]
    sequence = Batch(trees).lay()
    assert sequence.answer_examples.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sequence.answer_targets.tolist() == [1.0, 0.0, -1.0] * 3
    packed = PackedModel(model)
    packed.packing = packing
    with torch.no_grad():
        log_probs = packed.label_log_probs(sequence)
        scores = torch.zeros(9).index_add_(0, sequence.label_answers, log_probs)
        for place, (tree, answer) in enumerate((t, a) for t in trees for a in answers):
            ids = torch.tensor([tree.prompt_ids + answer])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(tree.prompt_ids) - 1 : -1]
            alone = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
            torch.testing.assert_close(scores[place], alone, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "mamba2", "mpt"])
@pytest.mark.parametrize("packing", [Packing.BATCHED, Packing.SINGLE])
def test_head_in_chunks(family, packing):
    model = model_of(family)
    trees = random_trees(5, prefix=4, seed=7)
    expected, reference = one_by_one(model, trees)
    loss, gradients = gradients_apart(model, trees, packing, chunked=True)
    assert loss == pytest.approx(expected, rel=2e-6)
    assert relative_error(gradients, reference) < 2e-6


def test_head_sees_label_positions_only():
    model = model_of("mamba2")
    seen = []
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    trees = random_trees(3, prefix=4, seed=7)
    gradients_apart(model, trees, Packing.BATCHED)
    assert seen == [(1, sum(len(tree.answers[0]) for tree in trees), 400)]


def test_padding_that_changes_the_result_is_found():
    model = model_of("llama")
    packed = PackedModel(model)
    assert why_not_batched(packed, device=CPU) is None
    forward = model.forward

    def chosen_by_length(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * (1 + 0.1 * (inputs["input_ids"].shape[1] > 15))
        return output

    model.forward = chosen_by_length
    reason = why_not_batched(packed, device=CPU)
    assert "LlamaForCausalLM computes sequences that are filled up to one length" in reason


def test_a_model_that_looks_ahead_is_refused():
    """Whatever its settings say: here they say nothing."""
    model = model_of("llama")
    packed = PackedModel(model)
    why_not_batched(packed, device=CPU)
    head = model.get_base_model().lm_head
    forward = head.forward
    head.forward = lambda hidden: forward(hidden + hidden.mean(dim=-2, keepdim=True))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM reads in both directions"):
        why_not_batched(packed, device=CPU)


def test_what_fills_a_sequence_up_has_no_gradient():
    """Whatever token it is."""
    model = model_of("mamba2")
    trees = random_trees(4, prefix=4, seed=9)
    sequence = Batch(trees).lay()
    filled = sequence.example_ids == -1
    assert filled.any()
    found = []
    for token in (0, 5):
        sequence.tokens[0, filled] = token
        loss = -PackedModel(model).label_log_probs(sequence).sum()
        loss.backward()
        found.append((loss.item(), take_gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert relative_error(found[0][1], found[1][1]) < 2e-6


def test_ranks_run_as_many_forwards():
    """Where sequences are computed one by one, a batch is given empty ones."""
    model = model_of("mamba2")
    packed = PackedModel(model)
    packed.packing = Packing.SINGLE
    [tree] = random_trees(1, prefix=4, seed=2)
    expected = packed.label_log_probs(Batch([tree]).lay())
    forwards = []
    model.register_forward_hook(lambda module, inputs, output: forwards.append(1))
    sequence = Batch([tree], at_least=3).lay()
    log_probs = packed.label_log_probs(sequence)
    assert len(forwards) == 3
    torch.testing.assert_close(log_probs, expected)
    functional.softplus(log_probs).sum().backward()
