"""One pass of the base for several adapters, of shapes that do not depend on whose parts they are.

What `SharedPass` computes part by part is computed here for all parts at once: they are padded to
one size, so that what the adapters add is a batch of products and attention is a batch of parts.
Layers are fused where they have the shape of fused ones. All of it runs within a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_fsdp.base.layers import decoder_layers
from lora_fsdp.compute import chunked_head
from lora_fsdp.compute.decoder_layer import unpack_ahead
from lora_fsdp.compute.grouped.layers import GroupedLayer, Parts, group_layers
from lora_fsdp.compute.grouped.sequences import StackedSequences
from lora_fsdp.compute.grouped.stacked_lora import StackedLora, add_adapters
from lora_fsdp.compute.packed_model import keeps_logits
from lora_fsdp.compute.shared_pass import SharedPass

_ATTENTION = "lora_fsdp_grouped_pass"


class GroupedPass:
    """Computes parts of one size, each with its own adapter.

    Args:
        shared: of the same model, which every rank holds whole.
        fused: whether layers are fused where they can be.
        captured: whether it will run in CUDA graphs.

    Attributes:
        packed: the model.
        layers: the fused layers; empty if there are none.
        why_not_fused: why, in words; empty if there are.
    """

    def __init__(self, shared: SharedPass, *, fused: bool = True, captured: bool = False) -> None:
        self.shared, self.packed = shared, shared.packed
        self._parts = Parts()
        layers = decoder_layers(self.packed.base)
        self.layers: list[GroupedLayer] = []
        self.why_not_fused = "not asked for"
        if fused:
            self.layers, self.why_not_fused = group_layers(layers, self._parts)
        for layer in self.layers:
            why = "fused layers compute several adapters at once"
            self.packed.patches.set(layer.layer, "forward", layer, why=why)
            layer.join_weights()
        if captured and self.layers:
            unpack_ahead(self.layers, recomputed=False)
        inside = {id(module) for layer in self.layers for module in layer.layer.modules()}
        self._others = {
            id(module): StackedLora([(module, slice(0, _width(module)))])
            for module in self.packed.model.modules()
            if isinstance(module, LoraLayer) and id(module) not in inside
        }
        self.stacks = [stacked for layer in self.layers for stacked in layer.stacks]
        self.stacks += self._others.values()

    # ---- adapters -------------------------------------------------------------------------------

    def stack(self, names: Sequence[str]) -> None:
        """Compute with these adapters from now on, in this order.

        Their parameters have gradients, which stay where they are.
        """
        for stacked in self.stacks:
            stacked.stack(names, dtype=self.packed.dtype)
        self._copies = _alike([pair for one in self.stacks for pair in one.copies()])
        self._gradients = _alike([pair for one in self.stacks for pair in one.gradients()])
        self._blocks = [block for one in self.stacks for block in one.blocks()]

    @property
    def leaves_padding_out(self) -> bool:
        """Whether it computes sequences with rows (`StackedSize.rows`)."""
        return (
            bool(self.layers)
            and len(self.packed.windows) <= 1
            and all(layer.adapts_attention_only for layer in self.layers)
        )

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Before the passes of a step."""
        torch._foreach_zero_(self._blocks)

    @torch.no_grad()
    def hand_over_gradients(self) -> None:
        """After the passes of a step: give every parameter its gradient."""
        for owns, here in self._gradients:
            torch._foreach_copy_(owns, here)

    # ---- computing ------------------------------------------------------------------------------

    def label_log_probs(self, sequences: StackedSequences) -> torch.Tensor:
        """Log-probabilities of all label tokens by their parts' adapters, in one pass.

        Backward adds the adapters' gradients to the stacks, and none to the parameters.

        Args:
            sequences: one for each adapter, on the model's device.

        Returns:
            [sequences * label tokens], float32 at least; of padding, whatever.
        """
        with torch.no_grad():
            for copies, originals in self._copies:
                torch._foreach_copy_(copies, originals)
        ids = sequences.whole.label_ids
        head = self.packed.base.get_output_embeddings()
        if self.packed.chunked_head and len(ids) > chunked_head.CHUNK:
            forward = chunked_head.log_probs_forward(cast(nn.Linear, head), ids)
            why = "the head runs in chunks"
            with self.packed.patches.for_now(cast(nn.Module, head), "forward", forward, why=why):
                return self._logits(sequences)[:, 0]
        return -functional.cross_entropy(self._logits(sequences), ids, reduction="none")

    def _logits(self, sequences: StackedSequences) -> torch.Tensor:
        """At the label positions, [sequences * label tokens, vocabulary], float32 at least."""
        whole, packed = sequences.whole, self.packed
        masks = sequences.masks(dtype=packed.dtype, windows=packed.windows)
        positions = whole.label_positions
        keep: dict[str, torch.Tensor] = {}
        at_labels: AbstractContextManager[None] = nullcontext()
        if self.layers and isinstance(masks, torch.Tensor):
            last, why = self.layers[-1], "only labels count"
            at_labels = packed.patches.for_now(last, "only_at", positions, why=why)
        elif keeps_logits(type(packed.base)):  # type: ignore[arg-type]
            keep = {"logits_to_keep": positions}
        with self._computing(sequences), at_labels:
            logits = packed.model(
                input_ids=whole.input_ids[None],
                position_ids=whole.position_ids[None],
                attention_mask=masks,
                use_cache=False,
                **keep,
            ).logits[0]
        if isinstance(at_labels, nullcontext) and not keep:
            logits = logits[positions]
        return cast(torch.Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))

    @contextmanager
    def _computing(self, sequences: StackedSequences) -> Iterator[None]:
        with ExitStack() as held:
            held.enter_context(self.shared.routed(self._add))
            if not self.layers:
                ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, partial(_attend, sequences.count))
                config, why = self.packed.base.config.get_text_config(), "attention of all parts"
                name = "_attn_implementation_internal"
                held.enter_context(self.packed.patches.for_now(config, name, _ATTENTION, why=why))
            self._parts.count, self._parts.rows = sequences.count, sequences.rows
            try:
                yield
            finally:
                self._parts.count, self._parts.rows = 0, None

    def _add(self, module: LoraLayer, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return add_adapters(self._others[id(module)], inputs, output)


def _attend(
    parts: int,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA of all parts as a batch, as transformers computes it."""
    query, key, value = (
        one[0].unflatten(1, (parts, -1)).transpose(0, 1) for one in (query, key, value)
    )
    found: torch.Tensor = sdpa_attention_forward(module, query, key, value, masks, **options)[0]
    return found.flatten(0, 1)[None], None


def _width(module: LoraLayer) -> int:
    return int(module.out_features)  # type: ignore[arg-type]


def _alike(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The pairs as lists for `_foreach_copy_`, apart those that it can only copy one by one.

    A single tensor with gaps would have it copy all others one by one, too.
    """
    found: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for whole in (True, False):
        chosen = [(to, of) for to, of in pairs if _is_dense(to, of) is whole]
        if chosen:
            found.append(([to for to, _ in chosen], [of for _, of in chosen]))
    return found


def _is_dense(to: torch.Tensor, of: torch.Tensor) -> bool:
    return to.is_contiguous() and of.is_contiguous()
