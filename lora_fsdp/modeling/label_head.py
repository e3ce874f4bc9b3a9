"""The output head where there is a label, and nowhere else."""

from __future__ import annotations

import inspect
from functools import cache

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional

from lora_fsdp.data.packing import Row, Tree, pack_row
from lora_fsdp.errors import UnsupportedModelError
from lora_fsdp.modeling.adapters import base_model
from lora_fsdp.modeling.attention import block_mask


def label_logits(model: nn.Module, row: Row, *, dtype: torch.dtype) -> torch.Tensor:
    """Logits at the row's label positions, [L, vocabulary], in float32 at least.

    The mask is always explicit and the cache always off: with `use_cache` unset a packed row's
    examples attend to each other without any error.
    """
    base = base_model(model) if isinstance(model, PeftModel) else model
    keep = {"logits_to_keep": row.label_positions} if _keeps_logits(type(base)) else {}  # type: ignore[arg-type]
    output = model(
        input_ids=row.input_ids[None],
        position_ids=row.position_ids[None],
        attention_mask=block_mask(row, dtype=dtype),
        use_cache=False,
        **keep,
    )
    logits = output.logits[0] if keep else output.logits[0][row.label_positions]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def label_log_probs(model: nn.Module, row: Row, *, dtype: torch.dtype) -> torch.Tensor:
    """Log-probability of each label token given all before it on its path, [L], float32 at least.

    Args:
        model: a causal LM, with or without adapter; may be sharded.
        row: the packed row, on the model's device.
        dtype: the dtype in which attention runs (the base's).
    """
    logits = label_logits(model, row, dtype=dtype)
    return -functional.cross_entropy(logits, row.label_ids, reduction="none")


def check_architecture(model: nn.Module, *, longest: int) -> None:
    """Refuse models whose forward cannot compute a packed row as its examples alone.

    Args:
        model: the causal LM, without adapter.
        longest: the longest example in tokens.
    """
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    for needed in ("attention_mask", "position_ids"):
        if needed not in accepted:
            raise UnsupportedModelError(
                f"{name} takes no `{needed}`, without which several examples cannot share a row: "
                "choose a model with rotary or learnt positions (Llama, Qwen, Mistral, Gemma, ...)."
            )
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    if getattr(config, "is_decoder", None) is False or getattr(config, "alibi", False):
        raise UnsupportedModelError(
            f"{name} reads in both directions (is_decoder: false) or weighs distances by ALiBi, "
            "which a packed row cannot give it: choose a causal model with rotary positions."
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
            "can keep apart within a row: choose an attention-only model."
        )
    window = getattr(config, "sliding_window", None) or getattr(
        config, "attention_chunk_size", None
    )
    if window is not None and longest > window:
        raise UnsupportedModelError(
            f"{name} attends over windows of {window} tokens, and examples may have {longest}: "
            f"set --max_length to at most {window}."
        )


@torch.no_grad()
def check_packed_rows(model: PeftModel, *, device: torch.device, dtype: torch.dtype) -> None:
    """Check on the live model that examples of one row are computed as if each stood alone.

    Two short random texts with a common beginning, packed and one by one; a collective call under
    FSDP. This catches what the architecture's name does not tell: attention that ignores the mask,
    positions that count along the row.

    Raises:
        UnsupportedModelError: they are not.
    """
    vocabulary = base_model(model).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, 12), generator=generator)
    tokens[1, :4] = tokens[0, :4]
    texts = tokens.tolist()
    trees = [Tree(text[:6], [text[6:]]) for text in texts]
    was_training = model.training
    model.eval()
    packed = label_log_probs(model, pack_row(trees, share_prefix=True).to(device), dtype=dtype)
    alone = [
        model(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0].float()
        for text in texts
    ]
    model.train(was_training)
    expected = torch.cat(
        [
            logits.log_softmax(-1)[5:-1].gather(1, torch.tensor(text[6:], device=device)[:, None])
            for logits, text in zip(alone, texts, strict=True)
        ]
    )[:, 0]
    difference = (packed - expected).abs().mean().item()
    # In nats a token. Rounding alone makes, in SmolLM2, 5e-6 in float32 and 0.085 in bfloat16.
    if not difference < (1e-4 if dtype == torch.float32 else 0.3):
        raise UnsupportedModelError(
            f"{type(base_model(model)).__name__} computes packed examples differently from single "
            f"ones (by {difference:.2g} nats a token): it cannot be trained in packed rows."
        )


@cache  # asked at every forward
def _keeps_logits(model_class: type[nn.Module]) -> bool:
    """Whether the model can run its head at chosen positions only (almost all in transformers)."""
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
