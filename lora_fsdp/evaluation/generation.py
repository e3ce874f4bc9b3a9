"""Text that a model generates, for every prompt on each rank or in batches that the ranks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_fsdp.data.packing import Packing
from lora_fsdp.ranks import from_every_rank, has_others, on_first_rank, rank, world_size

# What a batch may hold: prompts, and tokens with those still to be generated. The same on every
# device and number of ranks, since rounding depends on what shares a batch.
_MOST_PROMPTS = 32
_MOST_TOKENS = 16_384
# Where no right answer says how long answers are.
LEAST_NEW_TOKENS = 20


@torch.no_grad()
def generate_texts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    device: torch.device,
    max_new_tokens: int,
    temperature: float,
    end_token_id: int,
    packing: Packing = Packing.PACKED,
) -> list[str]:
    """The text generated after each prompt (only that: a prompt cannot be mistaken for it).

    A collective call under FSDP: every rank generates for every prompt, with the ranks' forwards
    kept in step (`synced_gpus`), and rank 0's texts are returned everywhere.

    Args:
        prompts: token ids.
        max_new_tokens: length limit in tokens.
        temperature: 0 is greedy.
        end_token_id: the token that ends an answer.
        packing: as of `plan_batches`.
    """
    plan = [list(range(len(prompts)))] if prompts else []
    if packing.is_apart:
        lengths = [len(prompt) for prompt in prompts]
        plan = plan_batches(lengths, max_new_tokens=max_new_tokens, packing=packing)
    mine: dict[int, str] = {}
    for places in plan:
        texts = generate_batch(
            model,
            tokenizer,
            [prompts[place] for place in places],
            device=device,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            end_token_id=end_token_id,
        )
        mine |= dict(zip(places, texts, strict=True))
    in_order = [mine[place] for place in range(len(prompts))]
    return on_first_rank(lambda: in_order) if prompts else []


@torch.no_grad()
def generate_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    device: torch.device,
    max_new_tokens: int,
    end_token_id: int,
    packing: Packing = Packing.PACKED,
) -> list[str]:
    """The text that greedy decoding generates after each prompt.

    A collective call under FSDP: every rank brings all prompts, generates its share of the batches
    and gets all texts. The division into batches does not depend on the number of ranks, so neither
    do the texts; a rank without a batch keeps step with the others on one of its own.

    Args:
        prompts: N prompts as token ids.
        max_new_tokens: length limit in tokens.
        end_token_id: the token that ends an answer.
        packing: as of `plan_batches`.

    Returns:
        N texts, the same on every rank.
    """
    lengths = [len(prompt) for prompt in prompts]
    plan = plan_batches(lengths, max_new_tokens=max_new_tokens, packing=packing)
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


def plan_batches(
    lengths: Sequence[int], *, max_new_tokens: int, packing: Packing = Packing.PACKED
) -> list[list[int]]:
    """Divide prompts of these lengths over batches, like with like; returns their indices.

    What fills prompts up on the left would go through a recurrent state: where no two examples
    share a sequence, a batch's prompts have one length; where each is computed alone, it has one.
    """
    batches: list[list[int]] = []
    most = 1 if packing is Packing.SINGLE else _MOST_PROMPTS
    for place in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # The longest so far: in this order a batch's last prompt sets its width.
        width = lengths[place] + max_new_tokens
        full = batches and (len(batches[-1]) + 1) * width > _MOST_TOKENS
        apart = packing.is_apart and batches and lengths[place] != lengths[batches[-1][-1]]
        if not batches or full or apart or len(batches[-1]) == most:
            batches.append([])
        batches[-1].append(place)
    return batches


@torch.no_grad()
def generate_batch(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    device: torch.device,
    max_new_tokens: int,
    temperature: float,
    end_token_id: int,
) -> list[str]:
    """As `generate_texts`, with this rank's own prompts and texts.

    Still a collective call under FSDP: the ranks' forwards are kept in step.
    """
    was_training = model.training
    model.eval()
    input_ids, attention_mask = _pad_left(prompts, tokenizer.pad_token_id, device)
    # Complete, so that nothing is taken over from the model's own file: a repetition penalty there
    # would make greedy decoding generate something else than the likeliest answer.
    sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=temperature > 0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        **sampling,
    )
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=settings,
        synced_gpus=has_others(),
    )
    model.train(was_training)
    return list(tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True))


def _pad_left(
    prompts: Sequence[list[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, longest] ids and mask, padded on the left so that all prompts end together."""

    def padded(sequences: Sequence[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(sequence) for sequence in sequences]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left").to(
            device
        )

    return padded(prompts, pad_token_id), padded([[1] * len(ids) for ids in prompts], 0)
