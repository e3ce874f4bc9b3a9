"""Which architectures can compute a packed sequence, as far as settings and signatures tell."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.errors import UnsupportedModelError

# Parts of the names of modules that hand a state from token to token.
_RECURRENT = ("mamba", "ssm", "recurrent", "deltanet", "rwkv", "lstm", "lightning", "conv1d")


def check_architecture(model: nn.Module, *, longest: int) -> None:
    """Refuse models whose forward cannot compute a packed sequence as its examples alone.

    Args:
        model: the causal LM, without adapter.
        longest: the longest example in tokens.
    """
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    for needed in ("attention_mask", "position_ids"):
        if needed not in accepted:
            raise UnsupportedModelError(
                f"{name} takes no `{needed}`, without which examples cannot share a sequence: "
                "choose a model with rotary or learnt positions (Llama, Qwen, Mistral, Gemma, ...)."
            )
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    both_ways = getattr(config, "is_decoder", None) is False and not _attends_causally(model)
    if both_ways or getattr(config, "alibi", False):
        raise UnsupportedModelError(
            f"{name} reads in both directions (is_decoder: false) or weighs distances by ALiBi, "
            "which a packed sequence cannot give it: choose a causal model with rotary positions."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UnsupportedModelError(
            f"{name} has {positions} positions, and examples may have {longest} tokens: set "
            f"--max_length to at most {positions}."
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if recurrent or (getattr(model, "_is_stateful", False) and _may_be_recurrent(model, kinds)):
        raise UnsupportedModelError(
            f"{name} mixes tokens by {sorted(recurrent) or 'a recurrent state'}, which no mask "
            "can keep apart within a sequence: choose an attention-only model."
        )
    window = getattr(config, "sliding_window", None) or getattr(
        config, "attention_chunk_size", None
    )
    if window is not None and longest > window:
        raise UnsupportedModelError(
            f"{name} attends over windows of {window} tokens, and examples may have {longest}: "
            f"set --max_length to at most {window}."
        )


def check_token_ids(
    model: PreTrainedModel, examples: Iterable[EncodedExample], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        model: the base, perhaps without its weights.
        examples: all that will be computed, as tokens.
        tokenizer: which made them, and pads.

    Raises:
        UnsupportedModelError: names the token and the first row that has it.
    """
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    highest = [(tokenizer.pad_token_id or 0, "pads")]
    for example in examples:
        answers = [token for ids in (example.target_ids, *example.candidate_ids) for token in ids]
        highest.append((max([*example.prompt_ids, *answers], default=0), f"row {example.row} has"))
    token, where = max(highest, key=lambda one: one[0])
    if token >= rows:
        raise UnsupportedModelError(
            f"The token {tokenizer.convert_ids_to_tokens(token)!r} ({token}), which {where}, is "
            f"beyond the {rows} embeddings of {type(model).__name__}: take the tokenizer that "
            "belongs to the model, or give the model more embeddings (resize_token_embeddings) and "
            "save it."
        )


def _attends_causally(model: nn.Module) -> bool:
    """Whether every attention says of itself that it is causal, whatever `is_decoder` says."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(said) and all(said)


def _may_be_recurrent(model: nn.Module, kinds: set[str]) -> bool:
    """Whether a model whose class can be recurrent has layers that are (or does not say)."""
    names = {type(module).__name__.lower() for module in model.modules()}
    return not kinds or any(part in name for name in names for part in _RECURRENT)
