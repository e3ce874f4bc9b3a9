"""Random texts that show how a model keeps examples apart."""

from __future__ import annotations

from typing import cast

import torch

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import Tree


def short_trees(packed: PackedModel) -> list[Tree]:
    """Two texts with a common beginning."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(_vocabulary(packed), (2, 12), generator=generator)
    tokens[1, :4] = tokens[0, :4]
    texts = cast(list[list[int]], tokens.tolist())
    return [Tree(text[:6], [text[6:]]) for text in texts]


def branching_trees(packed: PackedModel) -> list[Tree]:
    """Prompts of unlike lengths, which begin alike, each with several answers."""
    trees = [tree_of(packed, length) for length in (9, 17, 30)]
    shared = trees[0].prompt_ids[:4]
    return [
        Tree([*shared, *tree.prompt_ids[4:]], [tree.answers[0], tree.answers[0][1:], [1, 2, 3, 4]])
        for tree in trees
    ]


def trees_beyond_windows(packed: PackedModel) -> list[Tree]:
    """One text longer than each window of the model's layers."""
    sizes = {window.size for window in packed.windows.values() if window is not None}
    return [tree_of(packed, size + 12) for size in sorted(sizes)]


def tree_of(packed: PackedModel, length: int) -> Tree:
    """Random tokens, so many, of which the last three are the answer."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(_vocabulary(packed), (length,), generator=generator).tolist()
    return Tree(tokens[:-3], [tokens[-3:]])


def _vocabulary(packed: PackedModel) -> int:
    return int(packed.base.config.get_text_config().vocab_size)
