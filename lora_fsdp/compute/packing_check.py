"""The proof, on the live model, that packed examples are computed as if each stood alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch.distributed.tensor import DTensor

from lora_fsdp.compute.packed_model import PackedModel, head_can_be_chunked, keeps_logits
from lora_fsdp.data.packing import Tree, pack_sequence
from lora_fsdp.errors import UnsupportedModelError

# In nats a token. Rounding alone makes, in SmolLM2, 5e-6 in float32 and 0.085 in bfloat16.
_ROUNDING = {False: 1e-4, True: 0.3}
# How many times what rounding makes of two short texts the run's own examples may differ.
_TIMES_ROUNDING = 5
# Of the run's own examples, how many are computed alone as well.
_COMPARED = 6


@torch.no_grad()
def check_packing(
    packed: PackedModel, *, device: torch.device, sample: Sequence[Tree] = ()
) -> None:
    """Compare packed examples with single ones, and find out whether the head can run in chunks.

    Two short random texts with a common beginning catch what the architecture's name does not tell:
    attention that ignores the mask, positions that count along the sequence. The run's own examples
    at the run's own length catch what a model computes from the whole sequence: windows that count
    along it, factors chosen by its length. A collective call under FSDP.

    Args:
        packed: the model.
        device: where sequences are computed.
        sample: examples that fill a packed sequence as the run's will be filled.

    Raises:
        UnsupportedModelError: they differ, or are not finite.
    """
    was_training = packed.model.training
    packed.model.eval()
    short = _short_trees(packed)
    difference = _mean_difference(packed, short, short, device=device)
    if not difference < _rounding(packed):
        raise _refused(packed, difference, "two short ones")
    packed.chunked_head = _can_run_head_in_chunks(packed, short, device=device)
    if len(sample) > 1:
        _check_sample(packed, sample, most=_TIMES_ROUNDING * difference, device=device)
    packed.model.train(was_training)


def sample_of(trees: Sequence[Tree], *, tokens: int) -> list[Tree]:
    """Examples that fill a packed sequence of so many tokens, the longest of all at its end."""
    if not trees:
        return []
    longest = max(trees, key=len)
    chosen, used = [], len(longest)
    for tree in trees:
        if tree is longest:
            continue
        if used + len(tree) > tokens:
            break
        chosen.append(tree)
        used += len(tree)
    return [*chosen, longest]


def _check_sample(
    packed: PackedModel, sample: Sequence[Tree], *, most: float, device: torch.device
) -> None:
    compared = sample[:: -max(1, len(sample) // _COMPARED)][:_COMPARED]  # the last one first
    difference = _mean_difference(packed, sample, compared, device=device)
    if not difference < max(_rounding(packed), most):
        tokens = sum(map(len, sample))
        raise _refused(packed, difference, f"{len(sample)} of this run's in {tokens} tokens")


def _refused(packed: PackedModel, difference: float, which: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(packed.base).__name__} computes packed examples ({which}) differently from single "
        f"ones, by {difference:.2g} nats a token: it cannot be trained in packed sequences this "
        "long. A shorter --max_tokens_per_row helps where attention has a window; otherwise choose "
        "another model."
    )


def _not_finite(packed: PackedModel) -> UnsupportedModelError:
    named = [name for name, value in packed.base.named_parameters() if not _is_finite(value)]
    where = (
        f"its weight {named[0]} is not finite"
        if named
        else (f"its weights are finite here: they may be too large for {packed.dtype}")
    )
    return UnsupportedModelError(
        f"The untrained {type(packed.base).__name__} gives log-probabilities that are not finite: "
        f"{where}. The base's files are damaged, or were saved after a training that diverged; "
        "take the original ones."
    )


def _is_finite(weight: torch.Tensor) -> bool:
    """Of what this rank holds."""
    held = weight.to_local() if isinstance(weight, DTensor) else weight
    return not held.is_floating_point() or bool(held.isfinite().all())


def _rounding(packed: PackedModel) -> float:
    return _ROUNDING[packed.dtype == torch.bfloat16]


def _mean_difference(
    packed: PackedModel, trees: Sequence[Tree], compared: Sequence[Tree], *, device: torch.device
) -> float:
    """Between the label tokens of `compared` among `trees` in one sequence, and of each alone."""
    sequence = pack_sequence(trees, share_prefix=True).to(device)
    log_probs, owners = packed.label_log_probs(sequence), sequence.label_answers
    differences, answer = [], 0
    for tree in trees:
        if any(tree is one for one in compared):
            alone = _alone(packed, tree, device=device)
            if not alone.isfinite().all():
                raise _not_finite(packed)
            given = tree.given[0] if tree.given else 0
            differences.append(log_probs[owners == answer] - alone[given:])
        answer += len(tree.answers)
    return torch.cat(differences).abs().mean().item()


def _alone(packed: PackedModel, tree: Tree, *, device: torch.device) -> torch.Tensor:
    """Log-probabilities of an example's first answer by the model's own forward, [L]."""
    answer = torch.tensor(tree.answers[0], device=device)
    ids = torch.tensor([[*tree.prompt_ids, *tree.answers[0][:-1]]], device=device)
    positions = torch.arange(len(tree.prompt_ids) - 1, ids.shape[1], device=device)
    keep = {"logits_to_keep": positions} if keeps_logits(type(packed.base)) else {}  # type: ignore[arg-type]
    logits = packed.model(input_ids=ids, use_cache=False, **keep).logits[0].float()
    if not keep:
        logits = logits[positions]
    log_probs: torch.Tensor = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
    return log_probs


def _can_run_head_in_chunks(
    packed: PackedModel, trees: Sequence[Tree], *, device: torch.device
) -> bool:
    if not head_can_be_chunked(packed.base):
        return False
    sequence = pack_sequence(trees, share_prefix=True).to(device)
    whole = packed.label_log_probs(sequence)
    packed.chunked_head = True
    chunked = packed.label_outputs(sequence, chunk_above=0).log_probs
    return (chunked - whole).abs().max().item() < _ROUNDING[False]


def _short_trees(packed: PackedModel) -> list[Tree]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = packed.base.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (2, 12), generator=generator)
    tokens[1, :4] = tokens[0, :4]
    texts = cast(list[list[int]], tokens.tolist())
    return [Tree(text[:6], [text[6:]]) for text in texts]
