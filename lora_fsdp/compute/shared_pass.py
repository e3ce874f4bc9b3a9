"""Many adapters over one pass of the frozen base: a sequence of parts, each with its adapter.

The base's layers compute the tokens of all parts at once, so its weights are read, gathered and
unpacked once for all adapters. What an adapter adds is computed for its own part only, and so is
attention. So nothing of one part enters another, and a part's products with its adapter and its
attention have the shapes that they would have alone: they round alike, whoever else is there.

Prior art: Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285) for serving; LoRAFusion
(arXiv 2510.00206) and PLoRA (arXiv 2508.02932) for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_fsdp.compute.attention import dense_mask
from lora_fsdp.compute.packed_model import PackedModel, keeps_logits
from lora_fsdp.compute.recurrent.layers import follows_trees
from lora_fsdp.data.packing import PackedSequence
from lora_fsdp.errors import UnsupportedModelError

_ATTENTION = "lora_fsdp_shared_pass"

#: Of a LoRA layer, its inputs and its frozen layer's output: what it is to give.
Route = Callable[[LoraLayer, torch.Tensor, torch.Tensor], torch.Tensor]

#: What `peft.LoraConfig` may say of an adapter that shares a pass: ranks, scales, places and first
#: values. Everything else must be as it is by default.
SHARED_SETTINGS = frozenset(
    {
        "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        "init_lora_weights",
        # Bookkeeping.
        "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path",
        "revision", "inference_mode", "runtime_config", "fan_in_fan_out",
    }
)  # fmt: skip
#: First values that leave the base as it is.
_STARTS = (True, False, "gaussian", "orthogonal")


def why_apart(config: LoraConfig) -> str | None:
    """Why an adapter cannot share a pass with others; `None` if it can.

    Dropout draws from the one generator of all adapters, so that each would depend on the others.
    """
    if config.init_lora_weights not in _STARTS:
        return f"init_lora_weights {config.init_lora_weights!r} changes the base or needs data"
    default = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        if name not in SHARED_SETTINGS and value != default.get(name):
            return f"{name} is {value!r}"
    return None


def why_model_apart(base: nn.Module) -> str | None:
    """Why no adapters of a base can share a pass; `None` = its layers do not say so.

    Each part has a mask of its own, but no tree of its own.
    """
    if follows_trees(base):
        return "recurrent states of the base would run from one adapter's part into the next"
    return None


class SharedPass:
    """Routes each part of a sequence to its own adapter of a model that has several.

    Every LoRA layer's forward is patched (`PackedModel.patches`). Outside `only` and
    `label_log_probs` the model computes with no adapter.

    Args:
        packed: the model, its layers not fused, its attention SDPA, with adapters that `why_apart`
            lets share.

    Raises:
        UnsupportedModelError: an adapter has something that cannot be routed.
    """

    def __init__(self, packed: PackedModel) -> None:
        if (reason := why_model_apart(packed.base)) is not None:
            raise UnsupportedModelError(
                f"Adapters of {type(packed.base).__name__} cannot share a pass: {reason}. Train "
                "them one after the other (--adapters_at_once 1)."
            )
        self.packed = packed
        self._parts = _ONE_PART
        self._route: Route | None = None
        head = packed.base.get_output_embeddings()
        for name, module in packed.model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            if module is head or not _is_plain(module):
                raise UnsupportedModelError(
                    f"Adapters of {name} cannot share a pass over the base: train them one after "
                    "the other (--adapters_at_once 1)."
                )
            packed.patches.set(
                module,
                "forward",
                self._forward_of(module),
                why="each part of a sequence goes through its own adapter",
            )

    @contextmanager
    def only(self, adapter: str | None) -> Iterator[None]:
        """Within the block, everything goes through one adapter; `None` = the base alone."""
        before, self._parts = self._parts, _ONE_PART._replace(adapters=[adapter])
        try:
            yield
        finally:
            self._parts = before

    @contextmanager
    def routed(self, route: Route) -> Iterator[None]:
        """Within the block, `route` says what a LoRA layer gives, from its inputs and the frozen
        layer's output.
        """
        before, self._route = self._route, route
        try:
            yield
        finally:
            self._route = before

    def label_log_probs(
        self, sequences: Sequence[PackedSequence], adapters: Sequence[str | None]
    ) -> list[torch.Tensor]:
        """Log-probabilities of each sequence's label tokens by its own adapter, in one pass.

        Args:
            sequences: on the model's device, one for each of `adapters`.
            adapters: their names; `None` = the base alone.

        Returns:
            for each sequence [its label tokens], float32 at least.
        """
        lengths = [len(sequence) for sequence in sequences]
        dtype, windows = self.packed.dtype, self.packed.windows or {"": None}
        masks = [
            [dense_mask(one, dtype=dtype, window=window) for one in sequences]
            for window in windows.values()
        ]
        starts = [0, *accumulate(lengths)]
        positions = torch.cat(
            [start + one.label_positions for start, one in zip(starts, sequences, strict=False)]
        )
        ids = torch.cat([sequence.label_ids for sequence in sequences])
        before, self._parts = self._parts, _Parts(adapters, lengths, masks)
        try:
            logits = self._logits(sequences, positions)
        finally:
            self._parts = before
        log_probs = -functional.cross_entropy(logits, ids, reduction="none")
        return list(log_probs.split([len(one.label_ids) for one in sequences]))

    def _logits(self, sequences: Sequence[PackedSequence], positions: torch.Tensor) -> torch.Tensor:
        """[positions, vocabulary], in float32 at least."""
        base = self.packed.base
        keep = {"logits_to_keep": positions} if keeps_logits(type(base)) else {}  # type: ignore[arg-type]
        config = base.config.get_text_config()
        name = "_attn_implementation_internal"
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, partial(_attend_apart, self._parts))
        with self.packed.patches.for_now(config, name, _ATTENTION, why="attention part by part"):
            logits = self.packed.model(
                input_ids=torch.cat([one.input_ids for one in sequences])[None],
                position_ids=torch.cat([one.position_ids for one in sequences])[None],
                attention_mask=self._stand_ins(positions.device),
                use_cache=False,
                **keep,
            ).logits[0]
        if not keep:
            logits = logits[positions]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _stand_ins(self, device: torch.device) -> torch.Tensor | dict[str, torch.Tensor]:
        """In place of a mask for all layers, or for each kind of layer, as transformers takes them.

        A 4-D mask is handed on to attention as it is; its length says whose masks are meant.
        """
        made = [
            torch.zeros(1, 1, 1, place + 1, dtype=self.packed.dtype, device=device)
            for place in range(len(self._parts.masks))
        ]
        return made[0] if len(made) == 1 else dict(zip(self.packed.windows, made, strict=True))

    def _forward_of(self, module: LoraLayer) -> Callable[..., torch.Tensor]:
        def forward(inputs: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
            output = module.base_layer(inputs, *rest, **named)
            if self._route is not None:
                return self._route(module, inputs, output)
            if module.disable_adapters:
                return output
            names, lengths, _ = self._parts
            if not lengths:
                added = _update(module, names[0], inputs)
                return output if added is None else output + added.to(output.dtype)
            parts = zip(
                names, inputs.split(lengths, dim=-2), output.split(lengths, dim=-2), strict=True
            )
            return torch.cat([_with_update(module, *part) for part in parts], dim=-2)

        return forward


class _Parts(NamedTuple):
    """Of a sequence: the adapter of each part, its tokens, and for each kind of layer the parts'
    masks, [1, 1, T, T] each.

    No lengths = everything goes through the first adapter.
    """

    adapters: Sequence[str | None]
    lengths: list[int]
    masks: list[list[torch.Tensor]]


_ONE_PART = _Parts([None], [], [])


def _attend_apart(
    shared: _Parts,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stand_in: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA of each part by itself, as transformers computes it for one sequence."""
    queries, keys, values = (each.split(shared.lengths, dim=2) for each in (query, key, value))
    masks = shared.masks[stand_in.shape[-1] - 1]
    parts = zip(queries, keys, values, masks, strict=True)
    found = [sdpa_attention_forward(module, *part, **options)[0] for part in parts]
    return torch.cat(found, dim=1), None


def _update(module: LoraLayer, name: str | None, inputs: torch.Tensor) -> torch.Tensor | None:
    """What the adapter `name` adds for `inputs`, as PEFT computes it; `None` where it has none."""
    if name is None or name not in module.lora_A:
        return None
    down = cast(nn.Linear, module.lora_A[name])
    up = cast(nn.Linear, module.lora_B[name])
    update: torch.Tensor = up(down(inputs.to(down.weight.dtype))) * module.scaling[name]
    return update


def _with_update(
    module: LoraLayer, name: str | None, inputs: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    update = _update(module, name, inputs)
    return output if update is None else output + update.to(output.dtype)


def _is_plain(module: LoraLayer) -> bool:
    """Whether each adapter of `module` adds s B A x to a linear layer and does nothing else."""
    return (
        type(module).__name__ in ("Linear", "Linear4bit")
        and not module.merged
        and not module.lora_variant
        and all(_drops_nothing(one) for one in module.lora_dropout.values())
    )


def _drops_nothing(module: nn.Module) -> bool:
    """Also a dropout at work, where adapters answer and are not trained."""
    return type(module) is nn.Identity or (type(module) is nn.Dropout and not module.training)
