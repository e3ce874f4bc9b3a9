"""The sizes of a model with its adapter: all that placement knows of a model."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fsdp.compute.attention import BLOCKS_FROM_TOKENS

#: Bytes of one 4-bit weight: 4 bits, an 8-bit scale for 64 weights, a 32-bit one for 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a base with an adapter; parameters in numbers, not bytes.

    Attributes:
        class_name: of the model.
        layers: decoder layers.
        layer_parameters: of the largest layer.
        linear_parameters: of the linear layers and experts of one decoder layer, which 4-bit
            storage shrinks.
        largest_linear: of the largest linear layer, of those that fused layers compute as one, or
            of all experts of a layer (with what an adapter makes of them): what is unpacked at
            once where weights are packed.
        embedding_parameters: input embeddings; of the head too where they are tied.
        head_parameters: output head; 0 where it is tied.
        parameters: of the whole base.
        hidden_size, vocabulary_size: widths.
        adapter_parameters: that are trained.
        adapted_linears: linear layers with an adapter.
        adapted_width: their inputs and outputs, added up.
        saved_per_token: bytes that a token's forward keeps for backward, all layers.
        repeated_per_token: of that, keys and values that are repeated for every query head, which
            sequences of `BLOCKS_FROM_TOKENS` tokens and more do without.
        saved_per_pair: the same of a pair of tokens: 0 unless attention keeps its matrix.
        is_fused: whether fused layers compute.
        drops: whether LoRA or the model drops anything while it trains.
        is_recurrent: whether layers hand a state from token to token.
        why_not_fused: why they do not, in words; empty if they do.
        itemsize: bytes of a value of the base, where it is not quantised.
        idle_parameters: of one layer, those of the experts that a token is not sent to.
        packed_parameters: of the whole base, those that 4-bit storage shrinks; 0 = as many in every
            layer as in the largest.
        note: what could not be counted, and what stands in for it; empty if all was.
    """

    class_name: str
    layers: int
    layer_parameters: int
    linear_parameters: int
    largest_linear: int
    embedding_parameters: int
    head_parameters: int
    parameters: int
    hidden_size: int
    vocabulary_size: int
    adapter_parameters: int
    adapted_linears: int
    adapted_width: int
    saved_per_token: int
    repeated_per_token: int
    saved_per_pair: int
    is_fused: bool
    drops: bool = False
    is_recurrent: bool = False
    why_not_fused: str = ""
    itemsize: int = 2
    idle_parameters: int = 0
    packed_parameters: int = 0
    note: str = ""

    def saved_bytes(self, tokens: int, *, recomputed: bool) -> int:
        """What a sequence keeps for backward; recomputed: its layers' inputs, and one layer."""
        repeated = self.repeated_per_token if tokens >= BLOCKS_FROM_TOKENS else 0
        whole = (self.saved_per_token - repeated) * tokens + self.saved_per_pair * tokens**2
        if not recomputed:
            return whole
        return self.itemsize * self.hidden_size * self.layers * tokens + whole // self.layers

    @property
    def active_parameters(self) -> int:
        """Parameters that every token is multiplied with: the layers', not the embeddings'."""
        return (self.layer_parameters - self.idle_parameters) * self.layers

    @property
    def read_parameters(self) -> int:
        """Parameters that a packed sequence is multiplied with: its tokens reach all experts."""
        return self.layer_parameters * self.layers

    def layer_bytes(self, *, quantized: bool) -> int:
        """One decoder layer, in its dtype or in 4 bits."""
        if not quantized:
            return self.itemsize * self.layer_parameters
        rest = self.layer_parameters - self.linear_parameters
        return int(self.itemsize * rest + NF4_BYTES * self.linear_parameters)

    def base_bytes(self, *, quantized: bool) -> int:
        """The whole base; embeddings, head and norms are not quantised."""
        if quantized and self.packed_parameters:
            kept = self.parameters - self.packed_parameters
            return int(self.itemsize * kept + NF4_BYTES * self.packed_parameters)
        rest = self.parameters - self.layers * self.layer_parameters
        return self.itemsize * rest + self.layers * self.layer_bytes(quantized=quantized)
