"""Packed, prefix-sharing sequences give the losses and gradients of one-by-one training.

Run: python -m pytest tests/compute/test_packed_gradients.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import Tree, pack_sequence
from tests.support.tiny import CONFIGS, adapted_model, randomise_adapter

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-7}


def adapted(kind, dtype):
    model = adapted_model(kind)
    randomise_adapter(model)
    return model.to(dtype)


def one_by_one(model, trees):
    """The plain computation: each example alone, all logits, no mask of ours."""
    total = sum(len(tree.answers[0]) for tree in trees)
    losses = []
    for tree in trees:
        answer = tree.answers[0]
        ids = torch.tensor([tree.prompt_ids + answer])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        start = len(tree.prompt_ids)
        predicting = logits[start - 1 : start - 1 + len(answer)]
        loss = functional.cross_entropy(predicting, torch.tensor(answer), reduction="sum") / total
        loss.backward()
        losses.append(loss.item())
    return sum(losses), take_gradients(model)


def packed(model, trees, *, share_prefix):
    sequence = pack_sequence(trees, share_prefix=share_prefix)
    total = sum(len(tree.answers[0]) for tree in trees)
    loss = -PackedModel(model).label_log_probs(sequence).sum() / total
    loss.backward()
    return loss.item(), take_gradients(model)


def take_gradients(model):
    gradients = {}
    for name, parameter in trainable_parameters(model).items():
        gradients[name] = parameter.grad.double()
        parameter.grad = None
    return gradients


def relative_error(gradients, reference):
    difference = torch.stack([(gradients[n] - reference[n]).norm() for n in reference]).norm()
    return (difference / torch.stack([g.norm() for g in reference.values()]).norm()).item()


def tree(prompt, answer):
    return Tree(prompt, [answer])


def random_trees(count, *, prefix, seed):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(2, 400, (length,), generator=generator).tolist()

    head = tokens(prefix, prefix)
    return [tree(head + tokens(1, 30), tokens(1, 3)) for _ in range(count)]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_gradients_equal_one_by_one(kind, dtype, share_prefix):
    model = adapted(kind, dtype)
    trees = random_trees(8, prefix=25, seed=3)
    reference_loss, reference = one_by_one(model, trees)
    loss, gradients = packed(model, trees, share_prefix=share_prefix)
    assert loss == pytest.approx(reference_loss, rel=1e-6)
    assert relative_error(gradients, reference) < TOLERANCE[dtype]


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 6),
    prefix=st.integers(0, 20),
    seed=st.integers(0, 10_000),
    share_prefix=st.booleans(),
)
def test_any_lengths(count, prefix, seed, share_prefix):
    model = adapted("llama", torch.float32)
    trees = random_trees(count, prefix=prefix, seed=seed)
    _, reference = one_by_one(model, trees)
    _, gradients = packed(model, trees, share_prefix=share_prefix)
    assert relative_error(gradients, reference) < TOLERANCE[torch.float32]


def test_prefix_is_the_whole_prompt():
    model = adapted("llama", torch.float32)
    trees = [tree([5, 6, 7], [8, 0]), tree([5, 6, 7], [9, 10, 0]), tree([5, 6, 7, 11], [9, 0])]
    _, reference = one_by_one(model, trees)
    _, gradients = packed(model, trees, share_prefix=True)
    assert relative_error(gradients, reference) < TOLERANCE[torch.float32]


def test_changing_one_example_leaves_the_others_bit_identical():
    model = adapted("llama", torch.float32)
    trees = random_trees(4, prefix=10, seed=1)
    changed = [*trees]
    last = trees[-1]
    changed[-1] = tree([*last.prompt_ids[:-1], (last.prompt_ids[-1] + 1) % 400], last.answers[0])
    before, after = (
        PackedModel(model).label_log_probs(pack_sequence(t, share_prefix=True))
        for t in (trees, changed)
    )
    own = len(last.answers[0])
    assert torch.equal(before[:-own], after[:-own])
    assert not torch.equal(before[-own:], after[-own:])


def test_candidate_answers_score_as_they_would_alone():
    model = adapted("llama", torch.float32)
    answers = [[11, 0], [12, 13, 0], [14, 15, 16, 0]]
    prompts = [[3, 4, 5, *range(20 + i, 25 + 2 * i)] for i in range(3)]
    sequence = pack_sequence([Tree(prompt, answers) for prompt in prompts], share_prefix=True)
    with torch.no_grad():
        log_probs = PackedModel(model).label_log_probs(sequence)
        scores = torch.zeros(9).index_add_(0, sequence.label_answers, log_probs)
        alone = []
        for prompt in prompts:
            for answer in answers:
                logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
                table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                alone.append(table.gather(1, torch.tensor(answer)[:, None]).sum())
    torch.testing.assert_close(scores, torch.stack(alone), rtol=1e-5, atol=1e-5)
