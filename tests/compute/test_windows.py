"""Windows as part of the mask: packed examples that are longer than a layer sees.

Run: python -m pytest tests/compute/test_windows.py
"""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from lora_fsdp.compute import attention
from lora_fsdp.compute.architectures import check_architecture, why_apart, windows_of
from lora_fsdp.compute.attention import Window, dense_mask, sequence_mask
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import why_not_packed
from lora_fsdp.data.packing import Packing, Tree, pack_sequence
from tests.compute.test_packed_gradients import (
    one_by_one,
    random_trees,
    relative_error,
    take_gradients,
)
from tests.support.runs import toy_trainer
from tests.support.token_mixers import WINDOWED, adapted_family

CPU = torch.device("cpu")


def windowed(family):
    packed = PackedModel(adapted_family(family))
    packed.windows = windows_of(packed.base, longest=64)
    return packed


def gradients(packed, trees, *, share_prefix):
    total = sum(len(tree.answers[0]) for tree in trees)
    loss = -packed.label_log_probs(pack_sequence(trees, share_prefix=share_prefix)).sum() / total
    loss.backward()
    return loss.item(), take_gradients(packed.model)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("family", WINDOWED)
def test_gradients_equal_one_by_one(family, share_prefix):
    packed = windowed(family)
    check_architecture(packed.base, longest=64)
    assert why_apart(packed.base) is None
    trees = random_trees(6, prefix=12, seed=3)
    assert any(window.size == 8 for window in packed.windows.values() if window)
    expected, reference = one_by_one(packed.model, trees)
    loss, found = gradients(packed, trees, share_prefix=share_prefix)
    assert loss == pytest.approx(expected, rel=2e-6)
    assert relative_error(found, reference) < 2e-6


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_is_left_out_is_found(family):
    packed = windowed(family)
    assert why_not_packed(packed, device=CPU) is None
    packed.windows = {}
    assert "computes packed examples" in why_not_packed(packed, device=CPU)


def test_a_window_that_is_another_is_found():
    """Longer than the two short texts, and one token too large."""
    packed = windowed("mistral")
    packed.base.config.sliding_window = 40
    packed.windows = {"sliding_attention": Window(41)}
    assert "longer than a window" in why_not_packed(packed, device=CPU)
    packed.windows = {"sliding_attention": Window(40)}
    assert why_not_packed(packed, device=CPU) is None


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("family", ["mistral", "qwen3", "qwen2"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_fused_layers(monkeypatch, family, by_blocks):
    packed = windowed(family)
    assert packed.fuse().is_fused
    trees = random_trees(6, prefix=12, seed=3)
    expected, reference = one_by_one(packed.model, trees)
    if not by_blocks:
        loss, found = gradients(packed, trees, share_prefix=True)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert relative_error(found, reference) < 1e-5
        return
    monkeypatch.setattr(attention, "BLOCKS_FROM_TOKENS", 1)
    with torch.no_grad():  # flex attention has no backward on a CPU
        sequence = pack_sequence(trees, share_prefix=True)
        loss = -packed.label_log_probs(sequence).sum() / len(sequence.label_ids)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("window", [Window(4), Window(4, chunked=True)])
@pytest.mark.parametrize("answers", [1, 2])
def test_block_mask_is_the_dense_mask(monkeypatch, window, answers):
    monkeypatch.setattr(attention, "BLOCKS_FROM_TOKENS", 1)
    trees = [Tree([1, 2, 3, 4 + n, 5, 6], [[5, 6, 0], [7, 8, 0]][:answers]) for n in range(3)]
    for some in (trees, trees[:1]):
        sequence = pack_sequence(some, share_prefix=True)
        mask = sequence_mask(sequence, dtype=torch.float32, by_blocks=True, window=window)
        assert isinstance(mask, BlockMask)
        index = torch.arange(len(sequence))
        allowed = mask.mask_mod(0, 0, index[:, None], index[None, :])
        dense = dense_mask(sequence, dtype=torch.float32, window=window)[0, 0] == 0
        assert torch.equal(allowed, dense)
        assert not torch.equal(dense, dense_mask(sequence, dtype=torch.float32)[0, 0] == 0)


def test_a_run(tmp_path):
    """Whose examples are longer than the window of its layers."""
    trainer = toy_trainer(tmp_path, kind="gpt_oss", num_train_epochs=1)
    assert trainer.placement.packing.packing is Packing.PACKED
    assert trainer.packed.windows["sliding_attention"] == Window(8)
    assert min(len(one.prompt_ids) for one in trainer.train_dataset) > 8
    trainer.train()
    scores = trainer.score(trainer.eval_dataset[:2])
    for example, found in zip(trainer.eval_dataset[:2], scores.log_likelihoods, strict=True):
        for answer, score in zip(example.candidate_ids, found, strict=True):
            ids = torch.tensor([[*example.prompt_ids, *answer]])
            with torch.no_grad():
                logits = trainer.model(input_ids=ids, use_cache=False).logits[0]
            table = logits[len(example.prompt_ids) - 1 : -1].log_softmax(-1)
            alone = table.gather(1, torch.tensor([answer]).T).sum()
            torch.testing.assert_close(score, alone, rtol=1e-5, atol=1e-5)
