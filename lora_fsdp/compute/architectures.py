"""Which architectures can compute a packed sequence, as far as settings and signatures tell."""

from __future__ import annotations

import inspect

from torch import nn

from lora_fsdp.errors import UnsupportedModelError


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
    if getattr(config, "is_decoder", None) is False or getattr(config, "alibi", False):
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
    if recurrent or getattr(model, "_is_stateful", False):
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
