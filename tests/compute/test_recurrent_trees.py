"""Recurrent layers along a packed sequence's tree: what the plain computation gives, one by one.

Run: python -m pytest tests/compute/test_recurrent_trees.py
"""

import random
import sys

import pytest
import torch

from lora_fsdp.compute import shared_pass
from lora_fsdp.compute.architectures import why_apart
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import why_not_packed, why_not_shared
from lora_fsdp.compute.recurrent import functions, layers
from lora_fsdp.compute.recurrent.layers import follows_trees
from lora_fsdp.compute.recurrent.tree import SequenceTree
from lora_fsdp.compute.shared_pass import SharedPass
from lora_fsdp.data.packing import Pack, Packing, Tree
from lora_fsdp.errors import UnsupportedModelError
from tests.compute.test_packed_gradients import one_by_one, relative_error, take_gradients
from tests.support.tiny import adapted_model
from tests.support.token_mixers import FOLLOWING_TREES, adapted_family

CPU = torch.device("cpu")
#: Of gradients in float32; right-padded batches differ by up to 1.3e-6.
ROUNDING = 4e-6
#: Whose grouped matmuls know no float64.
WITH_EXPERTS = ("qwen3_next", "jamba")


def branching(count=5, *, seed=0):
    """Prompts of unlike lengths with a common beginning, each with one to three answers."""
    draw = random.Random(seed)
    ids = lambda length: [draw.randrange(400) for _ in range(length)]  # noqa: E731
    common = ids(9)
    return [
        Tree(
            common + ids(draw.randrange(0 if place else 1, 40)),
            [ids(draw.randrange(1, 6)) for _ in range(draw.randrange(1, 4))],
        )
        for place in range(count)
    ]


def alone(trees):
    return [Tree(tree.prompt_ids, [answer]) for tree in trees for answer in tree.answers]


def in_one_sequence(model, trees, *, share_prefix):
    with PackedModel(model) as packed:
        log_probs = packed.label_log_probs(Pack(trees, share_prefix=share_prefix).lay())
        loss = -log_probs.sum() / log_probs.numel()
        loss.backward()
    return loss.item(), take_gradients(model)


@pytest.mark.parametrize("family", FOLLOWING_TREES)
@pytest.mark.parametrize("share_prefix", [True, False])
def test_gradients_equal_one_by_one(family, share_prefix):
    """Answers continue from the state of their prompt, prompts from that of what they share."""
    model = adapted_family(family)
    trees = branching()
    expected, reference = one_by_one(model, alone(trees))
    loss, gradients = in_one_sequence(model, trees, share_prefix=share_prefix)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert relative_error(gradients, reference) < ROUNDING


class InDouble:
    """torch, whose float32 is float64: the layers compute their recurrences in float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("family", [one for one in FOLLOWING_TREES if one not in WITH_EXPERTS])
def test_in_float64_they_are_the_same(family, monkeypatch):
    """What differs in float32 is rounding and nothing else."""
    model = adapted_family(family).double()
    for module in model.modules():
        if type(module).__module__.startswith("transformers.models"):
            monkeypatch.setattr(sys.modules[type(module).__module__], "torch", InDouble())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    trees = branching()
    expected, reference = one_by_one(model, alone(trees))
    loss, gradients = in_one_sequence(model, trees, share_prefix=True)
    assert loss == pytest.approx(expected, rel=1e-13)
    assert relative_error(gradients, reference) < 1e-13


@pytest.mark.parametrize("family", FOLLOWING_TREES)
def test_the_live_check_lets_them_share_sequences(family):
    packed = PackedModel(adapted_family(family))
    assert why_apart(packed.base) is None
    assert why_not_packed(packed, device=CPU, sample=branching(8, seed=1)) is None
    assert packed.packing_of_prompts is Packing.BATCHED  # generated text: nothing on the left


def leaking(own, tree):
    """A recurrence that knows nothing of the tree."""
    return own


def without_state(own, tree):
    """A recurrence in which each segment starts from nothing."""
    given = functions.delta_rule(own, tree)

    class Forgetful(SequenceTree):
        def scan(self, tensors, run):
            return super().scan(tensors, lambda rows, states: run(rows, None))

    tree.__class__ = Forgetful
    return given


def padding_that_counts(own, tree):
    """A recurrence whose state goes on through what fills a segment up."""

    def counting(query, key, value, g, beta, **settings):
        return own(query, key, value, g=g - 0.5, beta=beta, **settings)

    return functions.delta_rule(counting, tree)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("torch_chunk_gated_delta_rule", leaking),
        ("torch_chunk_gated_delta_rule", without_state),
        ("torch_chunk_gated_delta_rule", padding_that_counts),
        ("causal_conv1d_fn", leaking),
    ],
)
def test_the_live_check_finds_a_state_that_is_not_the_path_s(monkeypatch, name, broken):
    monkeypatch.setitem(layers.ALONG_TREE, name, broken)
    packed = PackedModel(adapted_family("qwen3_next"))
    assert "differently" in why_not_packed(packed, device=CPU, sample=branching(8, seed=1))


def test_a_sequence_that_is_filled_up():
    """Padding is in no segment, and changes nothing."""
    model = adapted_family("qwen3_5_text").eval()
    sequence = Pack(branching(), share_prefix=True).lay()
    longer = sequence.padded(tokens=len(sequence) + 7, labels=sequence.labels.shape[1])
    with torch.no_grad(), PackedModel(model) as packed:
        expected = packed.label_log_probs(sequence)
        torch.testing.assert_close(packed.label_log_probs(longer), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba", "jamba", "lfm2"])
def test_recomputed_layers_follow_the_same_tree(family):
    model = adapted_family(family)
    trees = branching()
    expected, reference = one_by_one(model, alone(trees))
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss, gradients = in_one_sequence(model, trees, share_prefix=True)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert relative_error(gradients, reference) < ROUNDING


def test_two_models_of_a_class_do_not_meet():
    """What one of them is given is undone, and the other goes on."""
    first, second = adapted_family("qwen3_next"), adapted_family("qwen3_next")
    trees = branching()
    expected, _ = one_by_one(second, alone(trees))
    one, other = PackedModel(first), PackedModel(second)
    sequence = Pack(trees, share_prefix=True).lay()
    one.label_log_probs(sequence)
    other.label_log_probs(sequence)
    one.undo()
    assert -other.label_log_probs(sequence).mean().item() == pytest.approx(expected, rel=1e-6)
    other.undo()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            second(input_ids=ids, use_cache=False).logits,
            second.get_base_model()(input_ids=ids, use_cache=False).logits,
        )
    assert not follows_trees(torch.nn.Linear(2, 2))


def test_levels_of_a_tree():
    """The trunk once; prompts with several answers before them; one answer joins its prompt."""
    trees = [Tree([1, 2, 3], [[7, 8, 9], [7, 7]]), Tree([1, 2, 4, 5], [[6, 6]])]
    tree = SequenceTree(Pack(trees, share_prefix=True).lay())
    # places: 0 1 trunk, 2 prompt, 3 4 and 5 its answers; 6 7 prompt and 8 its one answer
    assert [level.tokens.tolist() for level in tree.levels] == [
        [[0, 1]],
        [[2, 9, 9], [6, 7, 8]],
        [[3, 4], [5, 9]],
    ]
    roots, *others = (level.parents for level in tree.levels)
    assert roots is None
    assert [parents.tolist() for parents in others] == [[0, 0], [0, 0]]
    assert tree.windows(3).tolist() == [
        [9, 9, 0],
        [9, 0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [1, 2, 5],
        [0, 1, 6],
        [1, 6, 7],
        [6, 7, 8],
    ]


@pytest.mark.parametrize("family", FOLLOWING_TREES)
def test_several_adapters_share_no_pass(family):
    """Which gives each part of a sequence a mask of its own, and no tree."""
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        SharedPass(PackedModel(adapted_family(family)))


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_the_live_check_finds_a_shared_pass_that_is_not_as_alone(monkeypatch, family):
    """Whatever the layers say of themselves."""
    monkeypatch.setattr(shared_pass, "why_model_apart", lambda base: None)
    shared = SharedPass(PackedModel(adapted_family(family)))
    assert "differently" in why_not_shared(shared, device=CPU, sample=branching())


def test_the_live_check_lets_plain_attention_share_a_pass():
    shared = SharedPass(PackedModel(adapted_model("llama")))
    assert why_not_shared(shared, device=CPU, sample=branching()) is None
