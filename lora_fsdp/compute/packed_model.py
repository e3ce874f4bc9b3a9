"""A model that computes packed sequences, and everything that is changed on it for that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from lora_fsdp.base.layers import base_model, decoder_layers
from lora_fsdp.compute import chunked_head
from lora_fsdp.compute.attention import Window, sequence_mask
from lora_fsdp.compute.decoder_layer import unpack_ahead
from lora_fsdp.compute.fusing import Fusing, fuse_layers
from lora_fsdp.compute.patches import Patches
from lora_fsdp.compute.recurrent.layers import RECURRENT_KINDS, follow_trees, follows_trees
from lora_fsdp.compute.recurrent.tree import SequenceTree
from lora_fsdp.data.packing import PackedSequence, Packing


class PackedModel(AbstractContextManager["PackedModel"]):
    """Computes packed sequences by a causal LM, and owns all that is patched on it for that.

    `patches` lists what is patched (as text: `str`); `undo` or the end of a `with` puts it back.
    Weights that `join_weights` joined stay joined: they are the same numbers.

    Args:
        model: a causal LM, with or without adapter; may be sharded, now or later.

    Attributes:
        model: the model.
        fusing: which of its layers are fused, or why none are.
        patches: what is changed on it.
        chunked_head: its logits are its head's output, frozen, so that many label tokens can be
            taken chunk by chunk (`check_packing` finds out).
        windows: the window of each kind of layer (`config.layer_types`), where an example may be
            longer than one (`windows_of`); empty = all layers have one mask.
        packing: how examples are to be laid into the sequences that it is given; where each has one
            of its own, whether several are computed at once.
        is_recomputed: activations are, in backward.
        shortened_last_layer: the last layer, if it is fused, is asked for label positions only. Not
            where its activations are recomputed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.fusing = Fusing()
        self.patches = Patches()
        self.chunked_head = False
        self.windows: Mapping[str, Window | None] = {}
        self.packing = Packing.PACKED
        self.is_recomputed = False
        self.shortened_last_layer = False
        self._follows_trees: bool | None = None

    @property
    def base(self) -> PreTrainedModel:
        """The model without adapter."""
        model = self.model
        return base_model(model) if isinstance(model, PeftModel) else cast(PreTrainedModel, model)

    @property
    def packing_of_prompts(self) -> Packing:
        """How prompts are laid that text is generated after: what fills them up on the left would
        go through a recurrent state.
        """
        recurrent = self.packing is Packing.PACKED and follows_trees(self.base)
        return Packing.BATCHED if recurrent else self.packing

    @property
    def dtype(self) -> torch.dtype:
        """In which attention runs: the base's."""
        return self.base.dtype

    # ---- patches --------------------------------------------------------------------------------

    def fuse(
        self,
        layers: Sequence[nn.Module] | None = None,
        *,
        filled_copy: Callable[[nn.Module], nn.Module] | None = None,
    ) -> Fusing:
        """Replace the layers by fused ones, if these compute the same; before they are sharded.

        Args:
            layers: the decoder layers; `None` = those of the base.
            filled_copy: gives a copy of a layer with its weights, if they have none yet.
        """
        base = self.base
        chosen = decoder_layers(base) if layers is None else layers
        self.fusing = fuse_layers(
            base.base_model, chosen, patches=self.patches, filled_copy=filled_copy
        )
        return self.fusing

    def join_weights(self) -> None:
        """Lay fused projections of one input in one block each. Not for sharded layers."""
        for layer in self.fusing.layers:
            layer.join_weights()

    def unpack_ahead(self, *, recomputed: bool) -> None:
        """Unpack packed weights ahead of their use (see `decoder_layer.unpack_ahead`)."""
        unpack_ahead(self.fusing.layers, recomputed=recomputed)

    def compile(self, layers: Iterable[nn.Module] | None = None) -> None:
        """Let torch compile each decoder layer at its first forward, once for all lengths."""
        chosen = decoder_layers(self.base) if layers is None else list(layers)
        with self.patches.recording(chosen, why="torch compiles the layers"):
            for layer in chosen:
                layer.compile(dynamic=True)

    def undo(self) -> None:
        """Leave the model as it was before anything was patched."""
        self.patches.undo()
        self.fusing = Fusing()
        self._follows_trees = None

    def __exit__(self, *error: object) -> None:
        self.undo()

    # ---- computing ------------------------------------------------------------------------------

    def label_logits(self, sequence: PackedSequence) -> torch.Tensor:
        """Logits at the label positions, [L, vocabulary], in float32 at least.

        The mask is always explicit and the cache always off: with `use_cache` unset a packed
        sequence's examples attend to each other without any error.
        """
        if sequence.apart:
            return self._logits_of_batch(sequence)
        mask = self._masks(sequence)
        last = self.fusing.layers[-1] if self.shortened_last_layer and self.fusing.layers else None
        at_labels: AbstractContextManager[None] = nullcontext()
        keep: dict[str, torch.Tensor] = {}
        if last is not None and isinstance(mask, torch.Tensor) and last.is_as_fused():
            positions = sequence.label_positions
            at_labels = self.patches.for_now(last, "only_at", positions, why="only labels count")
        elif keeps_logits(type(self.base)):  # type: ignore[arg-type]
            keep = {"logits_to_keep": sequence.label_positions}
        with at_labels:
            logits = self.model(
                input_ids=sequence.input_ids[None],
                position_ids=sequence.position_ids[None],
                attention_mask=mask,
                use_cache=False,
                **keep,
            ).logits[0]
        if isinstance(at_labels, nullcontext) and not keep:
            logits = logits[sequence.label_positions]
        return cast(torch.Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def _masks(
        self, sequence: PackedSequence
    ) -> torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask | SequenceTree]:
        """The mask of all layers, or one for each kind of layer, as transformers takes them; for
        recurrent ones the tree.
        """
        if self._follows_trees is None:
            self._follows_trees = follow_trees(self.base, self.patches)

        def mask(window: Window | None) -> torch.Tensor | BlockMask:
            # Only fused layers' attention takes a mask of blocks.
            by_blocks = self.fusing.is_fused
            return sequence_mask(sequence, dtype=self.dtype, by_blocks=by_blocks, window=window)

        if self._follows_trees:
            windows = {"full_attention": None, **self.windows}
            masks = {kind: mask(window) for kind, window in windows.items()}
            return masks | dict.fromkeys(RECURRENT_KINDS, SequenceTree(sequence))
        if len(self.windows) > 1:
            return {kind: mask(window) for kind, window in self.windows.items()}
        return mask(next(iter(self.windows.values()), None))

    def _logits_of_batch(self, sequence: PackedSequence) -> torch.Tensor:
        """`label_logits` of sequences of one example, computed as the model computes any text.

        No mask and no positions are given: what fills a sequence up stands behind it, where a
        causal model does not look.
        """
        ids = sequence.input_ids.view(len(sequence.apart), -1)
        head = self.base.get_output_embeddings()
        if head is None:
            logits = plain_logits(self.model, ids).flatten(0, 1)[sequence.label_positions]
        else:
            forward = _at_positions(head.forward, sequence.label_positions)
            with self.patches.for_now(head, "forward", forward, why="only labels count"):
                logits = plain_logits(self.model, ids)[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def label_log_probs(
        self, sequence: PackedSequence, *, chunk_above: int = chunked_head.CHUNK
    ) -> torch.Tensor:
        """[L] log-probability of each label token given all before it on its path, in float32 at
        least.

        Args:
            sequence: on the model's device.
            chunk_above: number of label tokens from which on the head runs chunk by chunk.
        """
        ids = sequence.label_ids
        if self.packing is Packing.SINGLE and len(sequence.apart) > 1:
            singles = sequence.singles()
            return torch.cat([self.label_log_probs(s, chunk_above=chunk_above) for s in singles])
        if self.chunked_head and len(ids) > chunk_above:
            head = cast(nn.Linear, self.base.get_output_embeddings())
            forward = chunked_head.log_probs_forward(head, ids)
            with self.patches.for_now(head, "forward", forward, why="the head runs in chunks"):
                return self.label_logits(sequence)[:, 0]
        return -functional.cross_entropy(self.label_logits(sequence), ids, reduction="none")

    @torch.no_grad()
    def reference_log_probs(self, sequence: PackedSequence) -> torch.Tensor:
        """`label_log_probs` of the frozen base alone, its adapter switched off, nothing dropped."""
        was_training = self.model.training
        self.model.eval()
        with cast(PeftModel, self.model).disable_adapter():
            log_probs = self.label_log_probs(sequence)
        self.model.train(was_training)
        return log_probs


def plain_logits(model: nn.Module, ids: torch.Tensor, **keep: torch.Tensor | int) -> torch.Tensor:
    """Logits of `ids` [N, T] by the model's own forward, without cache.

    `keep` is passed on to it.
    """
    base = base_model(model) if isinstance(model, PeftModel) else model
    cache = {"use_cache": False} if _takes_use_cache(type(base)) else {}  # type: ignore[arg-type]
    return cast(torch.Tensor, model(input_ids=ids, **cache, **keep).logits)


def _at_positions(
    forward: Callable[[torch.Tensor], torch.Tensor], positions: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A head's forward at some of a batch's tokens: [N, T, H] to [1, len(positions), ...]."""
    return lambda hidden: forward(hidden.flatten(0, 1).index_select(0, positions)[None])


def head_can_be_chunked(base: PreTrainedModel) -> bool:
    """Whether the head is a frozen linear layer (LoRA on it would not be one)."""
    head = base.get_output_embeddings()
    return (
        # FSDP gives the module another class.
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and not any(parameter.requires_grad for parameter in head.parameters())
    )


@cache
def _takes_use_cache(model_class: type[nn.Module]) -> bool:
    parameters = inspect.signature(model_class.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return "use_cache" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


@cache  # asked at every forward
def keeps_logits(model_class: type[nn.Module]) -> bool:
    """Whether the model can run its head at chosen positions only (almost all in transformers)."""
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
