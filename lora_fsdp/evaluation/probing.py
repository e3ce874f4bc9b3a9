"""The frozen probe: what a regression learns from the frozen base's hidden states, untrained.

A rival that trains in a second. Its features are the mean of the last hidden state over a prompt's
own tokens, and come from the forwards that score the untrained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from types import TracebackType
from typing import Any

import numpy as np
import torch

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.packing import SHARED, PackedSequence
from lora_fsdp.evaluation.baselines import choose_regression
from lora_fsdp.ranks import from_every_rank, sum_over_ranks

# Of features of mean 0 and variance 1, of which there may be more than rows.
_STRENGTHS = (1e-4, 1e-3, 1e-2)
_ROWS_AT_ONCE = 4096


def shared_tokens(examples: Sequence[EncodedExample]) -> int:
    """How many tokens all prompts begin with: the instruction, which tells no rows apart."""
    return len(commonprefix([one.prompt_ids for one in examples]))  # noqa: RUF071


@dataclass
class MeanStates:
    """The mean last hidden state of each of N prompts, gathered while sequences are scored.

    Used as a context around the forwards; `add` is called after each of them.

    Attributes:
        packed: the model.
        count: N.
        skip: tokens that all prompts begin with (`shared_tokens`), which are left out of the mean.
    """

    packed: PackedModel
    count: int
    skip: int

    def __enter__(self) -> MeanStates:
        base = self.packed.base
        inner = base.base_model
        self.is_known = inner is not base  # else its outputs are no hidden states
        self._states: list[torch.Tensor] = []
        self._rows: dict[int, torch.Tensor] = {}
        # Otherwise the last layer gives label positions only.
        self._shortened, self.packed.shortened_last_layer = self.packed.shortened_last_layer, False
        self._hook = inner.register_forward_hook(self._keep) if self.is_known else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.packed.shortened_last_layer = self._shortened
        if self._hook is not None:
            self._hook.remove()

    def _keep(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        self._states.append(outputs[0].flatten(0, 1))

    def add(self, sequence: PackedSequence, examples: Sequence[int]) -> None:
        """Take the states of the forwards since the last call, all of `sequence`'s examples."""
        kept, self._states = self._states, []
        if not examples or not kept:
            return
        if len(kept) > 1:  # a batch whose sequences were computed one by one
            tokens_of_all = torch.cat([one.tokens for one in sequence.singles()], dim=1)
            sequence = replace(sequence, tokens=tokens_of_all)
        states, count = torch.cat(kept).float(), len(examples)
        of_prompts = (sequence.answer_ids == 0) & (sequence.position_ids >= self.skip)
        common = of_prompts & (sequence.example_ids == SHARED)
        own = of_prompts & (sequence.example_ids > SHARED)
        owner = sequence.example_ids[own] - 1
        sums = states.new_zeros(count, states.shape[1]).index_add_(0, owner, states[own])
        tokens = torch.bincount(owner, minlength=count) + common.sum()
        means = (sums + states[common].sum(dim=0)) / tokens.clamp(min=1)[:, None]
        self._rows |= dict(zip(examples, means.cpu(), strict=True))

    def features(self, *, device: torch.device) -> np.ndarray | None:
        """[N, H] float32, the same on every rank; `None` if the model does not show its states.

        A collective call.
        """
        if not self.is_known:
            return None
        # A rank may have had no sequence of its own.
        widths = from_every_rank(next((len(row) for row in self._rows.values()), 0))
        features = torch.zeros(self.count, max(widths))
        for place, row in self._rows.items():
            features[place] = row
        for some in features.split(_ROWS_AT_ONCE):
            summed = some.to(device)
            sum_over_ranks(summed)
            some.copy_(summed)
        return features.numpy()


def probe_answers(train: np.ndarray, labels: Sequence[str], tested: np.ndarray) -> list[str]:
    """What a logistic regression on the features answers.

    Args:
        train: [N, H] features of rows to learn from.
        labels: their N labels.
        tested: [M, H] features of the rows to answer.
    """
    if len(set(labels)) < 2:
        return [labels[0]] * len(tested)
    mean, spread = train.mean(axis=0), train.std(axis=0)
    spread[spread == 0] = 1.0
    model = choose_regression((train - mean) / spread, labels, strengths=_STRENGTHS)
    return [str(label) for label in model.predict((tested - mean) / spread)]
