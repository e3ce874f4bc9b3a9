"""The proof, on the live model, that examples are computed together as if each stood alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch

from lora_fsdp.base.loading import LOADING_ERRORS
from lora_fsdp.base.unusable import unusable_weight
from lora_fsdp.compute.architectures import why_apart, windows_of
from lora_fsdp.compute.packed_model import (
    PackedModel,
    head_can_be_chunked,
    keeps_logits,
    plain_logits,
)
from lora_fsdp.compute.recurrent.layers import follows_trees
from lora_fsdp.compute.shared_pass import SharedPass
from lora_fsdp.data.packing import Batch, Pack, PackedSequence, Packing, Tree
from lora_fsdp.errors import UnsupportedModelError

Example = TypeVar("Example")

# In nats a token. Rounding alone makes, in SmolLM2, 5e-6 in float32 and 0.085 in bfloat16.
_ROUNDING = {False: 1e-4, True: 0.3}
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
    along it, factors chosen by its length. A collective call under FSDP.

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
        short = _short_trees(packed)
        if follows_trees(packed.base):
            short += _branching_trees(packed)
        try:
            difference = _mean_difference(packed, short, short, device=device)
        except (torch.OutOfMemoryError, UnsupportedModelError):
            raise
        except (NotImplementedError, *LOADING_ERRORS) as error:  # of its own code, over the mask
            said = (str(error).splitlines() or [""])[0][:120]
            name = type(packed.base).__name__
            return f"{name} cannot compute packed examples ({type(error).__name__}: {said})"
        if not difference < _rounding(packed):
            return _differs(packed, difference, "packed examples (short ones)")
        packed.chunked_head = _can_run_head_in_chunks(packed, short, device=device)
        if longer := _trees_beyond_windows(packed):
            found = _mean_difference(packed, [*short, *longer], longer, device=device)
            if not found < _rounding(packed):
                return _differs(packed, found, "packed examples longer than a window")
        if len(sample) > 1:
            compared = sample[:: -max(1, len(sample) // _COMPARED)][:_COMPARED]  # last one first
            most = max(_rounding(packed), _TIMES_ROUNDING * difference)
            difference = _mean_difference(packed, sample, compared, device=device)
            if not difference < most:
                which = f"{len(sample)} of this run's in {sum(map(len, sample))} tokens"
                return _differs(packed, difference, f"packed examples ({which})")
    return None


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
        parts = [_short_trees(packed), _branching_trees(packed), *([sample] if sample else [])]
        sequences = [_lay(packed, trees).to(device) for trees in parts]
        together = torch.cat(shared.label_log_probs(sequences, [None] * len(sequences)))
        alone = torch.cat([packed.label_log_probs(sequence) for sequence in sequences])
    difference = (together - alone).abs().mean().item()
    if difference < _rounding(packed):
        return None
    return _differs(packed, difference, "parts of a pass that adapters share")


@torch.no_grad()
def why_not_batched(
    packed: PackedModel, *, device: torch.device, sample: Sequence[Tree] = ()
) -> str | None:
    """Compare sequences of one example, several filled up to one length, with the same alone; and
    find out whether the head can run in chunks.

    Args and returns as of `why_not_packed`.

    Raises:
        UnsupportedModelError: the model looks ahead, or gives what is not finite.
    """
    with _laid(packed, Packing.BATCHED):
        _check_looks_back(packed, device=device)
        short = [*_short_trees(packed), _tree_of(packed, 21)]
        packed.chunked_head = _can_run_head_in_chunks(packed, short, device=device)
        by_length = sorted(sample, key=len)
        step = max(1, len(by_length) // _COMPARED)
        for trees, which in ((short, "three short ones"), (by_length[::-step][:_COMPARED], "its")):
            if len(trees) > 1:
                difference = _mean_difference(packed, trees, trees, device=device)
                if not difference < _rounding(packed):
                    what = f"sequences that are filled up to one length ({which})"
                    return _differs(packed, difference, what)
    return None


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
    tree = _tree_of(packed, 12)
    ids = torch.tensor([tree.prompt_ids + tree.answers[0]] * 2, device=device)
    ids[1, -1] = (ids[1, -1] + 1) % packed.base.config.get_text_config().vocab_size
    before = plain_logits(packed.model, ids)[:, :-1].float().log_softmax(-1)
    difference = (before[0] - before[1]).abs().mean().item()
    if difference > _rounding(packed):
        raise UnsupportedModelError(
            f"{type(packed.base).__name__} reads in both directions: another last token changes "
            f"the log-probabilities before it by {difference:.2g} nats. Choose a causal model."
        )


def _differs(packed: PackedModel, difference: float, what: str) -> str:
    return (
        f"{type(packed.base).__name__} computes {what} differently from single ones, by "
        f"{difference:.2g} nats a token"
    )


def _not_finite(packed: PackedModel) -> UnsupportedModelError:
    found = unusable_weight(packed.base)
    where = found or (
        f"its weights are finite here, so what it computes of them in {packed.dtype} is not. "
        "Try --dtype float32, or take the original files of the base"
    )
    return UnsupportedModelError(
        f"{type(packed.base).__name__} gives log-probabilities that are not finite: {where}."
    )


def _rounding(packed: PackedModel) -> float:
    return _ROUNDING[packed.dtype == torch.bfloat16]


def _mean_difference(
    packed: PackedModel, trees: Sequence[Tree], compared: Sequence[Tree], *, device: torch.device
) -> float:
    """Between the label tokens of `compared` among `trees` in one sequence, and of each alone."""
    sequence = _lay(packed, trees).to(device)
    log_probs, owners = packed.label_log_probs(sequence), sequence.label_answers
    differences, answer = [], 0
    for tree in trees:
        if any(tree is one for one in compared):
            given = tree.given or [0] * len(tree.answers)
            for place in sorted({0, len(given) // 2, len(given) - 1}):
                before = given[place]
                alone = _alone(packed, tree, place, device=device)
                if not alone.isfinite().all():
                    raise _not_finite(packed)
                differences.append(log_probs[owners == answer + place] - alone[before:])
        answer += len(tree.answers)
    return torch.cat(differences).abs().mean().item()


def _alone(packed: PackedModel, tree: Tree, place: int, *, device: torch.device) -> torch.Tensor:
    """Log-probabilities of one of an example's answers by the model's own forward, [L]."""
    answer = torch.tensor(tree.answers[place], device=device)
    ids = torch.tensor([[*tree.prompt_ids, *tree.answers[place][:-1]]], device=device)
    positions = torch.arange(len(tree.prompt_ids) - 1, ids.shape[1], device=device)
    keep = {"logits_to_keep": positions} if keeps_logits(type(packed.base)) else {}  # type: ignore[arg-type]
    logits = plain_logits(packed.model, ids, **keep)[0].float()
    if not keep:
        logits = logits[positions]
    log_probs: torch.Tensor = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
    return log_probs


def _can_run_head_in_chunks(
    packed: PackedModel, trees: Sequence[Tree], *, device: torch.device
) -> bool:
    kept = packed.packing.is_apart or keeps_logits(type(packed.base))  # type: ignore[arg-type]
    if not (kept and head_can_be_chunked(packed.base)):
        return False
    packed.chunked_head = False
    sequence = _lay(packed, trees).to(device)
    whole = packed.label_log_probs(sequence)
    packed.chunked_head = True
    chunked = packed.label_log_probs(sequence, chunk_above=0)
    return (chunked - whole).abs().max().item() < _ROUNDING[False]


def _lay(packed: PackedModel, trees: Sequence[Tree]) -> PackedSequence:
    return Batch(trees).lay() if packed.packing.is_apart else Pack(trees, share_prefix=True).lay()


def _trees_beyond_windows(packed: PackedModel) -> list[Tree]:
    sizes = {window.size for window in packed.windows.values() if window is not None}
    return [_tree_of(packed, size + 12) for size in sorted(sizes)]


def _tree_of(packed: PackedModel, length: int) -> Tree:
    """Random tokens, so many, of which the last three are the answer."""
    vocabulary = packed.base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(vocabulary, (length,), generator=generator).tolist()
    return Tree(tokens[:-3], [tokens[-3:]])


def _branching_trees(packed: PackedModel) -> list[Tree]:
    """Prompts of unlike lengths, which begin alike, each with several answers."""
    trees = [_tree_of(packed, length) for length in (9, 17, 30)]
    shared = trees[0].prompt_ids[:4]
    return [
        Tree([*shared, *tree.prompt_ids[4:]], [tree.answers[0], tree.answers[0][1:], [1, 2, 3, 4]])
        for tree in trees
    ]


def _short_trees(packed: PackedModel) -> list[Tree]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = packed.base.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (2, 12), generator=generator)
    tokens[1, :4] = tokens[0, :4]
    texts = cast(list[list[int]], tokens.tolist())
    return [Tree(text[:6], [text[6:]]) for text in texts]
