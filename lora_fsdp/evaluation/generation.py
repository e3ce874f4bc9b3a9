"""Free generation, for looking at the text that a model generates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_fsdp.ranks import has_others, on_first_rank


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
) -> list[str]:
    """The text generated after each prompt (only that: a prompt cannot be mistaken for it).

    A collective call under FSDP: every rank generates for every prompt, with the ranks' forwards
    kept in step (`synced_gpus`), and rank 0's texts are returned everywhere.

    Args:
        prompts: token ids.
        max_new_tokens: length limit in tokens.
        temperature: 0 is greedy.
        end_token_id: the token that ends an answer.
    """
    if not prompts:
        return []
    mine = generate_batch(
        model,
        tokenizer,
        prompts,
        device=device,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        end_token_id=end_token_id,
    )
    return on_first_rank(lambda: mine)


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
    # would make greedy decoding write something else than the likeliest answer.
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

    def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left").to(
            device
        )

    return padded(prompts, pad_token_id), padded([[1] * len(ids) for ids in prompts], 0)
