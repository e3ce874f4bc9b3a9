"""The output head where there is a label, and nowhere else."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from lora_fsdp.base.layers import base_model
from lora_fsdp.compute import chunked_head
from lora_fsdp.compute.attention import sequence_mask
from lora_fsdp.compute.decoder_layer import FusedLayer
from lora_fsdp.data.packing import PackedSequence, Tree, pack_sequence
from lora_fsdp.errors import UnsupportedModelError


class LabelOutputs(NamedTuple):
    """What the model says about a row's L label tokens.

    Attributes:
        log_probs: [L] float32 at least, log-probability given all before the token on its path.
        is_most_likely: [L] bool, whether no token is more likely.
    """

    log_probs: torch.Tensor
    is_most_likely: torch.Tensor


@dataclass(frozen=True)
class RowComputation:
    """How a model computes packed rows.

    Attributes:
        dtype: in which attention runs (the base's).
        by_blocks: its attention takes a `BlockMask` for long rows (fused layers do).
        chunked_head: its logits are its head's output, frozen, so that many label tokens can be
            taken chunk by chunk (`check_packing` finds out).
        last_layer: the last layer, if it is fused and can be asked for label positions only.
    """

    dtype: torch.dtype
    by_blocks: bool = False
    chunked_head: bool = False
    last_layer: FusedLayer | None = None


def label_logits(
    model: nn.Module, row: PackedSequence, *, computation: RowComputation
) -> torch.Tensor:
    """Logits at the row's label positions, [L, vocabulary], in float32 at least.

    The mask is always explicit and the cache always off: with `use_cache` unset a packed row's
    examples attend to each other without any error.
    """
    base = base_model(model) if isinstance(model, PeftModel) else model
    mask = sequence_mask(row, dtype=computation.dtype, by_blocks=computation.by_blocks)
    at_labels: AbstractContextManager[None] = nullcontext()
    keep: dict[str, torch.Tensor] = {}
    last = computation.last_layer
    if last is not None and isinstance(mask, torch.Tensor) and last.is_as_fused():
        at_labels = last.gives_only(row.label_positions)
    elif _keeps_logits(type(base)):  # type: ignore[arg-type]
        keep = {"logits_to_keep": row.label_positions}
    with at_labels:
        logits = model(
            input_ids=row.input_ids[None],
            position_ids=row.position_ids[None],
            attention_mask=mask,
            use_cache=False,
            **keep,
        ).logits[0]
    if isinstance(at_labels, nullcontext) and not keep:
        logits = logits[row.label_positions]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def label_outputs(
    model: nn.Module,
    row: PackedSequence,
    *,
    computation: RowComputation,
    chunk_above: int = chunked_head.CHUNK,
) -> LabelOutputs:
    """Log-probability of each label token, and whether it is the most likely one.

    Args:
        model: a causal LM, with or without adapter; may be sharded.
        row: the packed row, on the model's device.
        computation: how the model computes rows.
        chunk_above: number of label tokens from which on the head runs chunk by chunk.
    """
    if computation.chunked_head and row.labels.shape[1] > chunk_above:
        base = base_model(model) if isinstance(model, PeftModel) else model
        head: nn.Linear = base.get_output_embeddings()  # type: ignore[operator]
        with chunked_head.head_gives_log_probs(head, row.label_ids):
            both = label_logits(model, row, computation=computation)
        return LabelOutputs(both[:, 0], both[:, 1] > 0)
    logits = label_logits(model, row, computation=computation)
    log_probs = -functional.cross_entropy(logits, row.label_ids, reduction="none")
    return LabelOutputs(log_probs, logits.detach().argmax(dim=-1) == row.label_ids)


def label_log_probs(
    model: nn.Module, row: PackedSequence, *, computation: RowComputation
) -> torch.Tensor:
    """`label_outputs`' log-probabilities, [L], for training."""
    return label_outputs(model, row, computation=computation).log_probs


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
def check_packing(
    model: PeftModel, *, device: torch.device, computation: RowComputation
) -> RowComputation:
    """Check on the live model that examples of one row are computed as if each stood alone.

    Two short random texts with a common beginning, packed and one by one; a collective call under
    FSDP. This catches what the architecture's name does not tell: attention that ignores the mask,
    positions that count along the row.

    Returns:
        `computation`, with `chunked_head` switched off if the logits are not the head's output.

    Raises:
        UnsupportedModelError: they are not.
    """
    vocabulary = base_model(model).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, 12), generator=generator)
    tokens[1, :4] = tokens[0, :4]
    texts = tokens.tolist()
    row = pack_sequence([Tree(text[:6], [text[6:]]) for text in texts], share_prefix=True).to(
        device
    )
    was_training = model.training
    model.eval()
    packed = label_outputs(model, row, computation=computation)
    if computation.chunked_head:
        chunked = label_outputs(model, row, computation=computation, chunk_above=0)
        same = (chunked.log_probs - packed.log_probs).abs().max().item() < _ROUNDING[False]
        computation = replace(computation, chunked_head=same)
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
    difference = (packed.log_probs - expected).abs().mean().item()
    if not difference < _ROUNDING[computation.dtype == torch.bfloat16]:
        raise UnsupportedModelError(
            f"{type(base_model(model)).__name__} computes packed examples differently from single "
            f"ones (by {difference:.2g} nats a token): it cannot be trained in packed rows."
        )
    return computation


def head_can_be_chunked(base: PreTrainedModel) -> bool:
    """Whether the head is a frozen linear layer (LoRA on it would not be one)."""
    head = base.get_output_embeddings()
    return (
        # FSDP gives the module another class.
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and not any(parameter.requires_grad for parameter in head.parameters())
        and _keeps_logits(type(base))  # type: ignore[arg-type]
    )


# In nats a token. Rounding alone makes, in SmolLM2, 5e-6 in float32 and 0.085 in bfloat16.
_ROUNDING = {False: 1e-4, True: 0.3}


@cache  # asked at every forward
def _keeps_logits(model_class: type[nn.Module]) -> bool:
    """Whether the model can run its head at chosen positions only (almost all in transformers)."""
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
