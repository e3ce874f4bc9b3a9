"""Which architectures can compute a packed sequence, as far as settings and signatures tell."""

from __future__ import annotations

import inspect

from torch import nn

from lora_fsdp.errors import UnsupportedModelError

# Parts of the names of modules that hand a state from token to token.
_RECURRENT = ("mamba", "ssm", "recurrent", "deltanet", "rwkv", "lstm", "lightning", "conv1d")
# Causal models whose settings have `is_decoder: false` all the same, as their class's default.
_CAUSAL = ("gpt_neox", "gpt_neox_japanese")


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


def _attends_causally(model: nn.Module) -> bool:
    """Whether every attention says of itself that it is causal, whatever `is_decoder` says."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return all(said) if said else model.config.model_type in _CAUSAL  # type: ignore[union-attr]


def _may_be_recurrent(model: nn.Module, kinds: set[str]) -> bool:
    """Whether a model whose class can be recurrent has layers that are (or does not say)."""
    names = {type(module).__name__.lower() for module in model.modules()}
    return not kinds or any(part in name for name in names for part in _RECURRENT)
