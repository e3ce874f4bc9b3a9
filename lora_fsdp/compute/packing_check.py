"""The proof, on the live model, that examples are computed together as if each stood alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from lora_fsdp.base.loading import LOADING_ERRORS
from lora_fsdp.compute.architectures import why_apart, windows_of
from lora_fsdp.compute.live_check.alone import lay, mean_difference, rounding
from lora_fsdp.compute.live_check.gradients import few_of, why_gradients_differ
from lora_fsdp.compute.live_check.texts import (
    branching_trees,
    short_trees,
    tree_of,
    trees_beyond_windows,
)
from lora_fsdp.compute.packed_model import (
    PackedModel,
    head_can_be_chunked,
    keeps_logits,
    plain_logits,
)
from lora_fsdp.compute.recurrent.layers import follows_trees
from lora_fsdp.compute.shared_pass import SharedPass
from lora_fsdp.data.packing import Packing, Tree
from lora_fsdp.errors import UnsupportedModelError

Example = TypeVar("Example")

# In nats a token, of a head that computes in float32.
_HEAD_ROUNDING = 1e-4
# How many times what rounding makes of two short texts the run's own examples may differ.
_TIMES_ROUNDING = 5
# Of the run's own examples, how many are computed alone as well.
_COMPARED = 6


def check_packing(
    packed: PackedModel, *, device: torch.device, sample: Sequence[Tree] = ()
) -> None:
    """`why_not_packed`, as an error.

    Raises:
        UnsupportedModelError: packed examples differ from single ones, or are not finite.
    """
    if (reason := why_not_packed(packed, device=device, sample=sample)) is not None:
        raise UnsupportedModelError(
            f"{reason}: it cannot be trained in packed sequences this long. --packing auto gives "
            "each example a sequence of its own."
        )


@torch.no_grad()
def why_not_packed(
    packed: PackedModel, *, device: torch.device, sample: Sequence[Tree] = ()
) -> str | None:
    """Compare packed examples with single ones, and find out whether the head can run in chunks.

    Two short random texts with a common beginning catch what the architecture's name does not tell:
    attention that ignores the mask, positions that count along the sequence. The run's own examples
    at the run's own length catch what a model computes from the whole sequence: windows that count
    along it, factors chosen by its length. Where an adapter is trained, its gradients are compared
    as well, by one backward: what is wrong in them alone (a path that is detached, a state that
    leaks backward) shows nowhere else. A collective call under FSDP.

    Args:
        packed: the model.
        device: where sequences are computed.
        sample: examples that fill a packed sequence as the run's will be filled.

    Returns:
        in words how far they differ; `None` = no further than rounding.

    Raises:
        UnsupportedModelError: they are not finite.
    """
    with _laid(packed, Packing.PACKED):
        short = short_trees(packed)
        if follows_trees(packed.base):
            short += branching_trees(packed)
        try:
            difference = mean_difference(packed, short, short, device=device)
        except (torch.OutOfMemoryError, UnsupportedModelError):
            raise
        except (NotImplementedError, *LOADING_ERRORS) as error:  # of its own code, over the mask
            said = (str(error).splitlines() or [""])[0][:120]
            name = type(packed.base).__name__
            return f"{name} cannot compute packed examples ({type(error).__name__}: {said})"
        if not difference < rounding(packed):
            return _differs(packed, difference, "packed examples (short ones)")
        packed.chunked_head = _can_run_head_in_chunks(packed, short, device=device)
        if longer := trees_beyond_windows(packed):
            found = mean_difference(packed, [*short, *longer], longer, device=device)
            if not found < rounding(packed):
                return _differs(packed, found, "packed examples longer than a window")
        if len(sample) > 1:
            compared = sample[:: -max(1, len(sample) // _COMPARED)][:_COMPARED]  # last one first
            most = max(rounding(packed), _TIMES_ROUNDING * difference)
            difference = mean_difference(packed, sample, compared, device=device)
            if not difference < most:
                which = f"{len(sample)} of this run's in {sum(map(len, sample))} tokens"
                return _differs(packed, difference, f"packed examples ({which})")
        few = few_of(sample)
        which = f"{len(few)} of this run's" if few else "short ones"
        what = f"packed examples ({which})"
        return why_gradients_differ(packed, few or short, device=device, what=what)


@torch.no_grad()
def why_not_shared(
    shared: SharedPass, *, device: torch.device, sample: Sequence[Tree] = ()
) -> str | None:
    """Compare parts of one shared pass with the same in sequences of their own, by the base alone.

    A collective call under FSDP.

    Args:
        shared: over a model that may be packed.
        device: where sequences are computed.
        sample: examples that fill a part as the run's will be filled.

    Returns:
        in words how far they differ; `None` = no further than rounding.
    """
    packed = shared.packed
    with _laid(packed, Packing.PACKED), shared.only(None):
        parts = [short_trees(packed), branching_trees(packed), *([sample] if sample else [])]
        sequences = [lay(packed, trees).to(device) for trees in parts]
        together = torch.cat(shared.label_log_probs(sequences, [None] * len(sequences)))
        alone = torch.cat([packed.label_log_probs(sequence) for sequence in sequences])
    difference = (together - alone).abs().mean().item()
    if difference < rounding(packed):
        return None
    return _differs(packed, difference, "parts of a pass that adapters share")


@torch.no_grad()
def why_not_batched(
    packed: PackedModel, *, device: torch.device, sample: Sequence[Tree] = ()
) -> str | None:
    """Compare sequences of one example, several filled up to one length, with the same alone, by
    log-probabilities and gradients; and find out whether the head can run in chunks.

    Args and returns as of `why_not_packed`.

    Raises:
        UnsupportedModelError: the model looks ahead, or gives what is not finite.
    """
    with _laid(packed, Packing.BATCHED):
        _check_looks_back(packed, device=device)
        short = [*short_trees(packed), tree_of(packed, 21)]
        packed.chunked_head = _can_run_head_in_chunks(packed, short, device=device)
        by_length = sorted(sample, key=len)
        step = max(1, len(by_length) // _COMPARED)
        for trees, which in ((short, "three short ones"), (by_length[::-step][:_COMPARED], "its")):
            if len(trees) > 1:
                difference = mean_difference(packed, trees, trees, device=device)
                if not difference < rounding(packed):
                    what = f"sequences that are filled up to one length ({which})"
                    return _differs(packed, difference, what)
        few = few_of(by_length)
        what = "sequences that are filled up to one length"
        return why_gradients_differ(packed, few or short, device=device, what=what)


def keep_apart_if_needed(packed: PackedModel, *, device: torch.device, longest: int) -> None:
    """Have a few examples of up to `longest` tokens computed as they must be, whatever the model;
    nothing is said.
    """
    packed.packing = Packing.PACKED
    packed.windows = windows_of(packed.base, longest=longest)
    if why_apart(packed.base) or why_not_packed(packed, device=device):
        packed.packing = Packing.SINGLE


@contextmanager
def _laid(packed: PackedModel, packing: Packing) -> Iterator[None]:
    """The model in evaluation mode, given sequences laid so."""
    was_training, before = packed.model.training, packed.packing
    packed.model.eval()
    packed.packing = packing
    try:
        yield
    finally:
        packed.packing = before
        packed.model.train(was_training)


def sample_of(
    examples: Sequence[Example], tree_of: Callable[[Example], Tree], *, tokens: int
) -> list[Tree]:
    """Examples that fill a packed sequence of so many tokens, the longest of all at its end.

    Of all others the trees are let go of at once: there may be millions.
    """
    if not examples:
        return []
    longest = max(range(len(examples)), key=lambda place: len(tree_of(examples[place])))
    chosen, last = list[Tree](), tree_of(examples[longest])
    used = len(last)
    for place, example in enumerate(examples):
        if place == longest:
            continue
        tree = tree_of(example)
        if used + len(tree) > tokens:
            break
        chosen.append(tree)
        used += len(tree)
    return [*chosen, last]


def _check_looks_back(packed: PackedModel, *, device: torch.device) -> None:
    """Refuse a model in which a token changes what stands before it."""
    tree = tree_of(packed, 12)
    ids = torch.tensor([tree.prompt_ids + tree.answers[0]] * 2, device=device)
    ids[1, -1] = (ids[1, -1] + 1) % packed.base.config.get_text_config().vocab_size
    before = plain_logits(packed.model, ids)[:, :-1].float().log_softmax(-1)
    difference = (before[0] - before[1]).abs().mean().item()
    if difference > rounding(packed):
        raise UnsupportedModelError(
            f"{type(packed.base).__name__} reads in both directions: another last token changes "
            f"the log-probabilities before it by {difference:.2g} nats. Choose a causal model."
        )


def _differs(packed: PackedModel, difference: float, what: str) -> str:
    return (
        f"{type(packed.base).__name__} computes {what} differently from single ones, by "
        f"{difference:.2g} nats a token"
    )


def _can_run_head_in_chunks(
    packed: PackedModel, trees: Sequence[Tree], *, device: torch.device
) -> bool:
    kept = packed.packing.is_apart or keeps_logits(type(packed.base))  # type: ignore[arg-type]
    if not (kept and head_can_be_chunked(packed.base)):
        return False
    packed.chunked_head = False
    sequence = lay(packed, trees).to(device)
    whole = packed.label_log_probs(sequence)
    packed.chunked_head = True
    chunked = packed.label_log_probs(sequence, chunk_above=0)
    return (chunked - whole).abs().max().item() < _HEAD_ROUNDING
