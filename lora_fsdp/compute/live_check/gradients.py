"""The adapter's gradients of examples laid together, against those of the same examples alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_fsdp.base.layers import decoder_layers
from lora_fsdp.base.loading import LOADING_ERRORS
from lora_fsdp.compute.live_check.alone import alone, lay
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.packing import Tree
from lora_fsdp.errors import UnsupportedModelError

# In float32, of each parameter's gradient, relative to its norm: rounding makes 6e-6 in SmolLM2.
_ROUNDING = 1e-3
# In bfloat16, of all gradients together: of a single parameter's some are mostly rounding.
_COARSE_ROUNDING = 0.5
# A gradient is at least compared with this part of the parameters' mean one.
_LEAST = 0.1
# A sample larger than that takes longer and says no more; at most so many are computed alone.
_TOKENS, _COMPARED = 1024, 3

Gradients = Mapping[str, torch.Tensor]


def few_of(sample: Sequence[Tree]) -> list[Tree]:
    """The first examples, as many as gradients are compared of; empty if these are not two."""
    few, used = list[Tree](), 0
    for tree in sample:
        used += len(tree)
        if used > _TOKENS:
            break
        few.append(tree)
    return few if len(few) > 1 else []


def why_gradients_differ(
    packed: PackedModel, trees: Sequence[Tree], *, device: torch.device, what: str
) -> str | None:
    """Compare what a backward through `trees` in one sequence gives with what some of them give
    alone.

    Only the first, one in the middle and the last have a loss: what reaches the others' tokens all
    the same is a leak, and shows. A collective call under FSDP, with a backward on every rank.
    Gradients that were there stay as they were.

    Args:
        packed: the model, in evaluation mode.
        trees: at least two.
        device: where sequences are computed.
        what: these examples, in words.

    Returns:
        in words how far they differ; `None` = no further than rounding, or nothing is trained.

    Raises:
        UnsupportedModelError: no backward goes through an example alone.
    """
    trained = {n: p for n, p in packed.model.named_parameters() if p.requires_grad}
    if not trained:
        return None
    name = type(packed.base).__name__
    with torch.enable_grad(), _gradients_kept(trained.values()), _recomputed(packed):
        try:
            single = _one_by_one(packed, trees, trained, device=device)
        except (torch.OutOfMemoryError, UnsupportedModelError):
            raise
        except (NotImplementedError, *LOADING_ERRORS) as error:
            raise UnsupportedModelError(
                f"{name} cannot be trained: no backward goes through it ({_said(error)})."
            ) from error
        try:
            together = _together(packed, trees, trained, device=device)
        except (torch.OutOfMemoryError, UnsupportedModelError):
            raise
        except (NotImplementedError, *LOADING_ERRORS) as error:
            return f"{name} has no gradients of {what} ({_said(error)})"
    found = _difference(together, single)
    coarse = packed.dtype == torch.bfloat16
    difference = found.of_all if coarse else found.of_worst
    if difference < (_COARSE_ROUNDING if coarse else _ROUNDING):
        return None
    return (
        f"{name} computes the gradients of {what} differently from those of single ones, by "
        f"{found.of_worst:.2g} of their size in {found.worst}, though the log-probabilities are "
        "the same"
    )


def _together(
    packed: PackedModel,
    trees: Sequence[Tree],
    trained: Mapping[str, nn.Parameter],
    *,
    device: torch.device,
) -> Gradients:
    sequence = lay(packed, trees).to(device)
    log_probs, owners = packed.label_log_probs(sequence), sequence.label_answers
    parts = [
        weight * log_probs[owners == answer].sum()
        for weight, (_, _, answer) in enumerate(_compared(trees), start=1)
    ]
    torch.stack(parts).sum().backward()
    return _taken(trained)


def _one_by_one(
    packed: PackedModel,
    trees: Sequence[Tree],
    trained: Mapping[str, nn.Parameter],
    *,
    device: torch.device,
) -> Gradients:
    for weight, (tree, place, _) in enumerate(_compared(trees), start=1):
        (weight * alone(packed, tree, place, device=device).sum()).backward()
    return _taken(trained)


def _compared(trees: Sequence[Tree]) -> list[tuple[Tree, int, int]]:
    """Answers that have a loss: their example, which of its answers, and which of all.

    Their weights are unlike, so that what one gets of another does not make up for it.
    """
    firsts = [sum(len(tree.answers) for tree in trees[:place]) for place in range(len(trees))]
    chosen = sorted({0, len(trees) // 2, len(trees) - 1})[:_COMPARED]
    found = []
    for place in chosen:
        answer = len(trees[place].answers) // 2
        found.append((trees[place], answer, firsts[place] + answer))
    return found


def _taken(trained: Mapping[str, nn.Parameter]) -> Gradients:
    """The gradients that there are, which are let go of."""
    taken = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in trained.items()
    }
    for value in trained.values():
        value.grad = None
    return taken


class _Difference(NamedTuple):
    """How far gradients are apart: of one parameter, which one, and of all; relative to them."""

    of_worst: float
    worst: str
    of_all: float


def _difference(together: Gradients, single: Gradients) -> _Difference:
    names = list(single)
    sizes = torch.stack([single[name].float().norm() for name in names])
    apart = torch.stack([(together[name] - single[name]).float().norm() for name in names])
    if not apart.isfinite().all():
        return _Difference(float("inf"), names[int((~apart.isfinite()).nonzero()[0])], float("inf"))
    if not apart.any():  # also where there is no gradient at all
        return _Difference(0.0, names[0], 0.0)
    least = _LEAST * sizes.square().mean().sqrt()
    ratios = apart / torch.maximum(sizes, least)
    place = int(ratios.argmax())
    return _Difference(float(ratios[place]), names[place], float(apart.norm() / sizes.norm()))


@contextmanager
def _gradients_kept(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    before = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextmanager
def _recomputed(packed: PackedModel) -> Iterator[None]:
    """Recompute activations layer by layer where the run does: transformers' switch does nothing in
    evaluation mode.
    """
    with ExitStack() as stack:
        for layer in decoder_layers(packed.base) if packed.is_recomputed else ():
            again = partial(checkpoint, layer.forward, use_reentrant=False)
            why = "activations are recomputed in backward"
            stack.enter_context(packed.patches.for_now(layer, "forward", again, why=why))
        yield


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
