"""Which models can be trained, and which can compute a packed sequence, as far as settings tell."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_fsdp.compute.attention import Window
from lora_fsdp.compute.recurrent.layers import follows_trees
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.errors import UnsupportedModelError

# Parts of the names of modules that hand a state from token to token.
_RECURRENT = ("mamba", "ssm", "recurrent", "deltanet", "rwkv", "lstm", "lightning", "conv1d")

# Layer types whose tokens see what the mask lets them see (indexed attention chooses among these).
_MASKED = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}


def check_architecture(model: nn.Module, *, longest: int) -> None:
    """Refuse models that no example can be computed by as a causal LM is trained.

    Args:
        model: the causal LM, without adapter.
        longest: the longest example in tokens.

    Raises:
        UnsupportedModelError: it reads in both directions, or has too few positions.
    """
    name, config = type(model).__name__, _text_config(model)
    # Only of configs that can be an encoder's or a decoder's; the others are looked at alive.
    both = hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True)
    if both and not _attends_causally(model):
        raise UnsupportedModelError(
            f"{name} reads in both directions (is_decoder: false): choose a causal model."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UnsupportedModelError(
            f"{name} has {positions} positions, and examples may have {longest} tokens: set "
            f"--max_length to at most {positions}."
        )


def why_apart(model: nn.Module) -> str | None:
    """Why no mask keeps a packed sequence's examples apart, in words; `None` = nothing says so.

    Args:
        model: the causal LM, without adapter; it needs no weights.
    """
    name, config = type(model).__name__, _text_config(model)
    accepted = inspect.signature(model.forward).parameters
    for needed in ("attention_mask", "position_ids"):
        if needed not in accepted:
            return f"{name} takes no `{needed}`"
    if getattr(config, "alibi", False):
        return f"{name} weighs distances by ALiBi"
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo's, of its own making
        return f"{name} attends over windows that count along the sequence"
    kinds = set(getattr(config, "layer_types", None) or ())
    if follows_trees(model):  # its recurrent states go from a prompt to each of its answers
        return None
    recurrent = kinds - _MASKED
    if recurrent:
        return f"{name} mixes tokens by {' and '.join(sorted(recurrent))}"
    if getattr(model, "_is_stateful", False) and _may_be_recurrent(model, kinds):
        return f"{name} mixes tokens by a recurrent state"
    return None


def windows_of(model: nn.Module, *, longest: int) -> dict[str, Window | None]:
    """The window of each kind of layer (`config.layer_types`; `None` = none), if an example can be
    longer than one; otherwise nothing.

    Args:
        model: the causal LM, without adapter; it needs no weights.
        longest: the longest example in tokens.
    """
    config = _text_config(model)
    sizes = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    windows = {
        kind: Window(size, chunked=kind == "chunked_attention")
        for kind, size in sizes.items()
        if isinstance(size, int) and longest > size
    }
    kinds = sorted(set(getattr(config, "layer_types", None) or windows))
    return {kind: windows.get(kind) for kind in kinds} if windows.keys() & set(kinds) else {}


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


def _text_config(model: nn.Module) -> PretrainedConfig:
    return cast(PreTrainedModel, model).config.get_text_config()


def _attends_causally(model: nn.Module) -> bool:
    """Whether every attention says of itself that it is causal, whatever `is_decoder` says."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(said) and all(said)


def _may_be_recurrent(model: nn.Module, kinds: set[str]) -> bool:
    """Whether a model whose class can be recurrent has layers that are (or does not say)."""
    names = {type(module).__name__.lower() for module in model.modules()}
    return not kinds or any(part in name for name in names for part in _RECURRENT)
