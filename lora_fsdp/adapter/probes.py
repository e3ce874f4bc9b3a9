"""A few fixed questions that an adapter must answer alike wherever it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.packing import Batch, Pack, Tree
from lora_fsdp.tasks import Example, Prompt

#: Texts of our own, so that nothing of the training data is stored beside an adapter.
PROBE_TEXTS = (
    "I waited two hours and nobody could tell me why.",
    "Great crew, thank you for the help!",
    "Does the flight from Boston leave at 7:45?",
)
_FREE_ANSWER = " yes"
_MOST_ANSWERS = 16

# In nats a token, on average. Rounding alone makes, in SmolLM2, 5e-6 in float32 and 0.085 in
# bfloat16 (as in `check_packing`).
_TOLERANCE = 1e-3
_TOLERANCE_ROUNDED = 0.3


@dataclass(frozen=True)
class Probe:
    """A prompt and answers to it, as token ids."""

    prompt_ids: list[int]
    answers: list[list[int]]


def build_probes(encoder: Encoder, examples: Sequence[Example]) -> list[Probe]:
    """The fixed texts, prompted as the task does, with all labels (or a fixed answer) to score.

    Args:
        examples: the run's. What stands around the text in all of them is taken over; a task whose
            prompts differ there may have put data into them, so then the bare texts are used.
    """
    frames = {(example.prompt.before, example.prompt.after) for example in examples}
    before, after = frames.pop() if len(frames) == 1 and len(examples) > 1 else ("", "")
    asked = [Example(0, Prompt(before, text, after), None) for text in PROBE_TEXTS]
    encoded = encoder.encode(
        [
            one if encoder.kind.candidates(one) else replace(one, target=_FREE_ANSWER)
            for one in asked
        ]
    )
    return [Probe(one.prompt_ids, list(one.scored_ids[:_MOST_ANSWERS])) for one in encoded]


@torch.no_grad()
def probe_log_likelihoods(
    packed: PackedModel, probes: Sequence[Probe], *, device: torch.device
) -> list[list[float]]:
    """Log-likelihood of every answer of every probe.

    Every rank computes all of them, so under FSDP it is a collective call with the same result
    everywhere.
    """
    was_training = packed.model.training
    packed.model.eval()
    results = []
    for probe in probes:
        trees = [Tree(probe.prompt_ids, probe.answers)]
        laid = Batch(trees) if packed.packing.is_apart else Pack(trees, share_prefix=True)
        sequence = laid.lay().to(device)
        log_probs = packed.label_log_probs(sequence)
        sums = torch.zeros(len(probe.answers), dtype=log_probs.dtype, device=device)
        results.append(sums.index_add_(0, sequence.label_answers, log_probs).tolist())
    packed.model.train(was_training)
    return results


def probe_difference(
    probes: Sequence[Probe], saved: Sequence[Sequence[float]], now: Sequence[Sequence[float]]
) -> float:
    """Mean absolute difference of the log-likelihoods, in nats a token."""
    differences = [
        abs(before - after) / len(answer)
        for probe, were, are in zip(probes, saved, now, strict=True)
        for answer, before, after in zip(probe.answers, were, are, strict=True)
    ]
    return sum(differences) / len(differences)


def probe_tolerance(*dtypes: str) -> float:
    """How far probes may differ between bases of these dtypes, in nats a token."""
    return _TOLERANCE if set(dtypes) == {"float32"} else _TOLERANCE_ROUNDED
