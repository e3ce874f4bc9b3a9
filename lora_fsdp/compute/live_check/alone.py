"""An example alone, by the model's own forward, and how far what is packed may differ from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_fsdp.base.unusable import unusable_weight
from lora_fsdp.compute.packed_model import PackedModel, keeps_logits, plain_logits
from lora_fsdp.data.packing import Batch, Pack, PackedSequence, Tree
from lora_fsdp.errors import UnsupportedModelError

# In nats a token. Rounding alone makes, in SmolLM2, 5e-6 in float32 and 0.085 in bfloat16.
_ROUNDING = {False: 1e-4, True: 0.3}


def rounding(packed: PackedModel) -> float:
    """In nats a token, what a difference of log-probabilities may be in the model's dtype."""
    return _ROUNDING[packed.dtype == torch.bfloat16]


def lay(packed: PackedModel, trees: Sequence[Tree]) -> PackedSequence:
    """The trees laid as the model is given them."""
    return Batch(trees).lay() if packed.packing.is_apart else Pack(trees, share_prefix=True).lay()


def places(tree: Tree) -> list[int]:
    """Which of an example's answers are compared: the first, one in the middle, and the last."""
    return sorted({0, len(tree.answers) // 2, len(tree.answers) - 1})


def alone(packed: PackedModel, tree: Tree, place: int, *, device: torch.device) -> torch.Tensor:
    """Log-probabilities of the label tokens of one of an example's answers, [L].

    Raises:
        UnsupportedModelError: they are not finite.
    """
    answer = torch.tensor(tree.answers[place], device=device)
    ids = torch.tensor([[*tree.prompt_ids, *tree.answers[place][:-1]]], device=device)
    positions = torch.arange(len(tree.prompt_ids) - 1, ids.shape[1], device=device)
    keep = {"logits_to_keep": positions} if keeps_logits(type(packed.base)) else {}  # type: ignore[arg-type]
    logits = plain_logits(packed.model, ids, **keep)[0].float()
    if not keep:
        logits = logits[positions]
    log_probs: torch.Tensor = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
    if not log_probs.isfinite().all():
        raise _not_finite(packed)
    return log_probs[tree.given[place] if tree.given else 0 :]


def mean_difference(
    packed: PackedModel, trees: Sequence[Tree], compared: Sequence[Tree], *, device: torch.device
) -> float:
    """Between the label tokens of `compared` among `trees` in one sequence, and of each alone."""
    sequence = lay(packed, trees).to(device)
    log_probs, owners = packed.label_log_probs(sequence), sequence.label_answers
    differences, answer = [], 0
    for tree in trees:
        if any(tree is one for one in compared):
            for place in places(tree):
                single = alone(packed, tree, place, device=device)
                differences.append(log_probs[owners == answer + place] - single)
        answer += len(tree.answers)
    return torch.cat(differences).abs().mean().item()


def _not_finite(packed: PackedModel) -> UnsupportedModelError:
    found = unusable_weight(packed.base)
    where = found or (
        f"its weights are finite here, so what it computes of them in {packed.dtype} is not. "
        "Try --dtype float32, or take the original files of the base"
    )
    return UnsupportedModelError(
        f"{type(packed.base).__name__} gives log-probabilities that are not finite: {where}."
    )
