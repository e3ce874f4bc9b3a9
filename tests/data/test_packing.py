"""Packed sequences: nothing lost, nothing twice, every token knows where it belongs.

Run: python -m pytest tests/data/test_packing.py
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fsdp.compute.attention import dense_mask
from lora_fsdp.data import packing
from lora_fsdp.data.packing import (
    SHARED,
    Tree,
    common_prefix,
    empty_sequence,
    pack_sequence,
    plan_packs,
)

tokens = st.lists(st.integers(2, 9), min_size=1, max_size=12)
answers = st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@st.composite
def forests(draw):
    """Trees that may share a beginning."""
    head = draw(st.lists(st.integers(2, 9), max_size=8))
    return draw(
        st.lists(st.builds(lambda p, a: Tree(head + p, a), tokens, answers), min_size=1, max_size=9)
    )


@settings(max_examples=200, deadline=None)
@given(trees=forests(), max_tokens=st.integers(1, 60), share_prefix=st.booleans())
def test_plan_takes_every_tree_once_in_order_and_keeps_the_limit(trees, max_tokens, share_prefix):
    plan = plan_packs(trees, max_tokens=max_tokens, share_prefix=share_prefix)
    assert [index for pack in plan for index in pack.indices] == list(range(len(trees)))
    for pack in plan:
        assert list(pack.trees) == [trees[index] for index in pack.indices]
        packed = pack.lay()
        assert len(pack.trees) == 1 or len(packed) <= max_tokens
        assert packed.size == pack.size
    for pack, following in pairwise(plan):
        # No sequence is left with room for the first tree of the next one.
        shared = len(common_prefix(trees)) if share_prefix else 0
        fuller = shared + sum(len(tree) - shared for tree in [*pack.trees, following.trees[0]])
        assert fuller > max_tokens


def test_plan_of_nothing():
    assert plan_packs([], max_tokens=10, share_prefix=True) == []


def test_the_common_prefix_is_worked_out_once(monkeypatch):
    """For the plan, the size and the sequence itself, where one sequence holds all."""
    asked, work_out = [], packing.common_prefix
    monkeypatch.setattr(packing, "common_prefix", lambda trees: asked.append(0) or work_out(trees))
    [pack] = plan_packs([Tree([5, 6], [[0]]), Tree([5, 7], [[0]])], max_tokens=9, share_prefix=True)
    assert pack.size == pack.lay().size
    assert len(asked) == 1


def test_answers_carry_their_examples_and_targets():
    trees = [Tree([5, 6], [[1, 0], [2, 0]], [0.25, 0.75]), Tree([5, 7], [[3, 4, 0]])]
    packed = pack_sequence(trees, share_prefix=True)
    assert packed.answer_examples.tolist() == [0, 0, 1]
    assert packed.answer_targets.tolist() == [0.25, 0.75, 1.0]
    padded = packed.padded(tokens=20, labels=9)
    assert padded.answer_examples.tolist() == [0, 0, 1] + [-1] * 6
    assert padded.answer_targets.tolist() == [0.25, 0.75, 1.0] + [0.0] * 6
    again = packed.padded(tokens=20, labels=9)
    again.copy_(pack_sequence(trees[::-1], share_prefix=True).padded(tokens=20, labels=9))
    assert again.answer_examples.tolist() == [0, 1, 1] + [-1] * 6


@settings(max_examples=200, deadline=None)
@given(trees=forests(), share_prefix=st.booleans())
def test_every_label_is_predicted_from_its_own_path(trees, share_prefix):
    """Walking back from a label along what the mask allows gives the prompt and the answer."""
    packed = pack_sequence(trees, share_prefix=share_prefix)
    allowed = dense_mask(packed, dtype=torch.float32)[0, 0] == 0
    expected = [
        (tree.prompt_ids + answer[:count], answer[count])
        for tree in trees
        for answer in tree.answers
        for count in range(len(answer))
    ]
    found = [
        (packed.input_ids[allowed[at]].tolist(), int(token))
        for at, token in zip(packed.label_positions, packed.label_ids, strict=True)
    ]
    assert found == expected
    for at in packed.label_positions:
        path = packed.position_ids[allowed[at]]
        assert path.tolist() == list(range(len(path)))


@settings(max_examples=100, deadline=None)
@given(trees=forests(), share_prefix=st.booleans())
def test_owners_and_lengths(trees, share_prefix):
    packed = pack_sequence(trees, share_prefix=share_prefix)
    shared = len(common_prefix(trees)) if share_prefix else 0
    assert len(packed) == shared + sum(len(tree) - shared for tree in trees)
    owners = [
        owner
        for owner, answer in enumerate(answer for tree in trees for answer in tree.answers)
        for _ in answer
    ]
    assert packed.label_answers.tolist() == owners
    assert packed.tokens.dtype == packed.labels.dtype == torch.int64
    assert (packed.example_ids == SHARED).sum() == shared


def test_a_sequence_by_hand():
    trees = [Tree([5, 6, 7], [[1, 0]]), Tree([5, 6, 8, 9], [[2, 3, 0], [4, 0]])]
    packed = pack_sequence(trees, share_prefix=True)
    assert packed.input_ids.tolist() == [5, 6, 7, 1, 8, 9, 2, 3, 4]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 4]
    assert packed.example_ids.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert packed.answer_ids.tolist() == [0, 0, 0, 1, 0, 0, 1, 1, 2]
    assert packed.label_positions.tolist() == [2, 3, 5, 6, 7, 5, 8]
    assert packed.label_ids.tolist() == [1, 0, 2, 3, 0, 4, 0]
    assert packed.label_answers.tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_a_prompt_that_is_the_prefix_itself():
    trees = [Tree([5, 6], [[1, 0]]), Tree([5, 6, 7], [[2, 0]])]
    packed = pack_sequence(trees, share_prefix=True)
    assert packed.input_ids.tolist() == [5, 6, 1, 7, 2]
    assert packed.label_positions.tolist() == [1, 2, 3, 4]
    assert packed.position_ids.tolist() == [0, 1, 2, 2, 3]


def test_a_single_tree_shares_its_whole_prompt():
    packed = pack_sequence([Tree([5, 6], [[1, 0], [2, 3, 0]])], share_prefix=True)
    assert packed.example_ids.tolist() == [0, 0, 1, 1, 1]
    assert packed.label_positions.tolist() == [1, 2, 1, 3, 4]


def test_mask_by_hand():
    trees = [Tree([5, 6], [[1, 0]]), Tree([5, 7], [[2, 0], [3, 0]])]
    mask = dense_mask(pack_sequence(trees, share_prefix=True), dtype=torch.float32)
    assert mask.shape == (1, 1, 6, 6)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 1, 0, 1],
    ]
    assert mask.unique().tolist() == [float("-inf"), 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mask_has_the_dtype_of_attention(dtype):
    assert (
        dense_mask(pack_sequence([Tree([5], [[0]])], share_prefix=True), dtype=dtype).dtype == dtype
    )


def test_empty_sequence():
    packed = empty_sequence()
    assert len(packed) == 1
    assert (
        packed.label_positions.numel()
        == packed.label_ids.numel()
        == packed.label_answers.numel()
        == 0
    )
    assert dense_mask(packed, dtype=torch.float32).tolist() == [[[[0.0]]]]


def test_a_sequence_moves_whole():
    packed = pack_sequence([Tree([5, 6], [[1, 0]])], share_prefix=True).to(torch.device("meta"))
    assert packed.tokens.device.type == packed.labels.device.type == "meta"
