"""Text that a model generates by greedy decoding, in batches that the ranks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_fsdp.evaluation.generation import generate_batch
from lora_fsdp.ranks import from_every_rank, rank, world_size

# What a batch may hold: prompts, and tokens with those still to be generated. The same on every
# device and number of ranks, since rounding depends on what shares a batch.
_MOST_PROMPTS = 32
_MOST_TOKENS = 16_384
# Where no right answer says how long answers are.
LEAST_NEW_TOKENS = 20


@torch.no_grad()
def generate_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    device: torch.device,
    max_new_tokens: int,
    end_token_id: int,
) -> list[str]:
    """The text that greedy decoding generates after each prompt.

    A collective call under FSDP: every rank brings all prompts, generates its share of the batches
    and gets all texts. The division into batches does not depend on the number of ranks, so neither
    do the texts; a rank without a batch keeps step with the others on one of its own.

    Args:
        prompts: N prompts as token ids.
        max_new_tokens: length limit in tokens.
        end_token_id: the token that ends an answer.

    Returns:
        N texts, the same on every rank.
    """
    plan = plan_batches([len(prompt) for prompt in prompts], max_new_tokens=max_new_tokens)
    generated: dict[int, str] = {}
    for first in range(0, len(plan), world_size()):
        place_of_mine = first + rank()
        mine = plan[place_of_mine] if place_of_mine < len(plan) else []
        texts = generate_batch(
            model,
            tokenizer,
            [prompts[place] for place in mine] or [[end_token_id]],
            device=device,
            max_new_tokens=max_new_tokens if mine else 1,
            temperature=0.0,
            end_token_id=end_token_id,
        )
        generated |= dict(zip(mine, texts, strict=False))
    generated = {place: text for part in from_every_rank(generated) for place, text in part.items()}
    return [generated[place] for place in range(len(prompts))]


def plan_batches(lengths: Sequence[int], *, max_new_tokens: int) -> list[list[int]]:
    """Divide prompts of these lengths over batches, like with like; returns their indices."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # The longest so far: in this order a batch's last prompt sets its width.
        width = lengths[place] + max_new_tokens
        full = batches and (len(batches[-1]) + 1) * width > _MOST_TOKENS
        if not batches or full or len(batches[-1]) == _MOST_PROMPTS:
            batches.append([])
        batches[-1].append(place)
    return batches
