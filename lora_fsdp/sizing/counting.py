"""A model's sizes, counted: parameters, and what a token leaves for backward.

Both are counted on the meta device, where a model has shapes and no numbers, with the adapter that
will be trained and the layers that will compute: whatever the architecture, nothing is estimated
from its name.
"""

from __future__ import annotations

# autograd.Function's forward and backward take what each function needs.
# mypy: disable-error-code="override, no-untyped-call, no-untyped-def"
import copy
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.base.dropout import dropout_settings
from lora_fsdp.base.experts.packed import stacked_parameters
from lora_fsdp.base.layers import base_model, decoder_layers
from lora_fsdp.base.loading import LOADING_ERRORS
from lora_fsdp.base.multimodal import auto_class, drop_towers
from lora_fsdp.compute.decoder_layer import FusedLayer
from lora_fsdp.compute.fusing import exchange_forwards, why_not_fused
from lora_fsdp.compute.packed_model import keeps_logits, plain_logits
from lora_fsdp.compute.patches import Patches
from lora_fsdp.compute.recurrent.layers import follows_trees
from lora_fsdp.errors import UnsupportedModelError
from lora_fsdp.placement.shape import ModelShape

# What configs call the number of experts that a token is sent to.
_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def shape_of(
    skeleton: PreTrainedModel,
    adapter: LoraConfig,
    *,
    stay: str | None = None,
    packed: bool = True,
) -> ModelShape:
    """Count a model that has no numbers yet; `skeleton` gets the adapter and is of no further use.

    Args:
        skeleton: the base on the meta device, in the dtype it computes in (`build_on_meta`).
        adapter: what is trained.
        stay: why the model's own layers are to compute; `None` = fused ones do, where the model has
            their shape.
        packed: whether examples share sequences.

    Raises:
        UnsupportedModelError: it has no list of decoder layers.
        TargetModulesError: the adapter's target modules match nothing.
    """
    adapter = copy.deepcopy(adapter)  # PEFT writes the base's name into it
    adapter.base_model_name_or_path = None  # and warns where another one stands
    adapter.init_lora_weights = True  # of whatever values: there are none
    drop_towers(skeleton, adapter=adapter, say=False)
    layers = decoder_layers(skeleton)
    # An adapter draws its first values, though there are none: the run's own come after.
    with torch.random.fork_rng(devices=[]):
        model = attach_adapter(skeleton, adapter)
    reasons = [stay] if stay is not None else [why_not_fused(layer) for layer in layers]
    unfused = next((reason for reason in reasons if reason is not None), "")
    drops = bool(adapter.lora_dropout or dropout_settings(skeleton.config))
    recurrent = follows_trees(skeleton)
    counted = _counted(
        skeleton, model, layers, drops=drops, unfused=unfused, packed=packed and not recurrent
    )
    return replace(counted, is_recurrent=recurrent)


def _counted(
    base: PreTrainedModel,
    model: PeftModel,
    layers: list[nn.Module],
    *,
    drops: bool,
    unfused: str,
    packed: bool,
) -> ModelShape:
    is_fused = not unfused
    (per_token, per_pair), note = _saved_or_estimated(
        model, layers, is_fused=is_fused, packed=packed
    )
    widths = base.config.get_text_config()
    largest = max(layers, key=_frozen)
    packed_sizes = [sum(_linear_sizes(one)) + sum(map(sum, _stacks(one))) for one in layers]
    adapted: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    return ModelShape(
        class_name=type(base).__name__,
        layers=len(layers),
        layer_parameters=_frozen(largest),
        linear_parameters=max(packed_sizes),
        largest_linear=max(_largest_linear(layer, is_fused=is_fused) for layer in layers),
        embedding_parameters=_frozen(embedding),
        head_parameters=0 if tied else _frozen(head),
        parameters=_frozen(model),
        hidden_size=int(widths.hidden_size),
        vocabulary_size=int(widths.vocab_size),
        adapter_parameters=sum(p.numel() for p in trainable_parameters(model).values()),
        adapted_linears=len(adapted),
        adapted_width=sum(int(m.in_features) + int(m.out_features) for m in adapted),
        saved_per_token=per_token,
        repeated_per_token=sum(map(_repeated_bytes, layers)) if is_fused else 0,
        saved_per_pair=per_pair,
        is_fused=is_fused,
        drops=drops,
        why_not_fused=unfused,
        itemsize=base.dtype.itemsize,
        idle_parameters=_idle(largest, widths),
        packed_parameters=sum(packed_sizes) if len(set(packed_sizes)) > 1 else 0,
        note=note,
    )


def build_on_meta(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a config, without numbers.

    Args:
        config: its config.
        dtype: in which it computes.
        attention: its attention kernel, as transformers calls it; `None` = the model's choice.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UnsupportedModelError: it is not a causal language model's.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = auto_class(config).from_config(
                config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, *LOADING_ERRORS) as error:
        raise UnsupportedModelError(
            f"The config describes no causal language model: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    model.tie_weights()
    return model


def _saved_or_estimated(
    model: PeftModel, layers: list[nn.Module], *, is_fused: bool, packed: bool
) -> tuple[tuple[int, int], str]:
    """Bytes kept a token and a pair of tokens, and a note if they could only be estimated."""
    base = base_model(model)
    try:
        if is_fused:
            fused = [FusedLayer(layer) for layer in layers]
            exchange_forwards(base.base_model, fused, patches=Patches())
        return _saved(model, packed=packed), ""
    # Layers that look at numbers (experts that tokens are sent to) do not run without any.
    except (NotImplementedError, *LOADING_ERRORS) as error:
        config = base.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        used = getattr(config, "num_experts_per_tok", None) or 1
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        return (
            (base.dtype.itemsize * len(layers) * (10 * config.hidden_size + 4 * inner * used), 0),
            f"{type(base).__name__} does not run without numbers ({reason}): its activations are "
            "estimated from its widths, and may be far off",
        )


def _saved(model: PeftModel, *, packed: bool) -> tuple[int, int]:
    """The linear and the square part of what a forward keeps, from three lengths."""
    unit = 64 if packed else _unit_of_recurrence(base_model(model))
    short, middle, long = (_saved_bytes(model, unit * times, packed=packed) for times in (1, 2, 3))
    pair = max(0.0, (long - 2 * middle + short) / (2 * unit**2))
    return round((middle - short) / unit - 3 * unit * pair), round(pair)


def _unit_of_recurrence(base: PreTrainedModel) -> int:
    """Tokens in which a recurrent layer's work grows: of a chunk, or few where each is a step."""
    config = base.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("chunk_size", "mamba_chunk_size"))
    chunked = [size for size in sizes if isinstance(size, int)]
    if chunked:
        return max(chunked)
    return 64 if "linear_attention" in (getattr(config, "layer_types", None) or ()) else 16


def _saved_bytes(model: PeftModel, tokens: int, *, packed: bool) -> int:
    """Bytes that autograd keeps of a forward over one sequence on the meta device."""
    own = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # the tensors too, so that no storage is used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    model.train()
    base = base_model(model)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    with saved_tensors_hooks(keep, lambda tensor: tensor), _AttentionByKernel():
        if packed:
            model(
                input_ids=ids,
                attention_mask=torch.zeros(1, 1, tokens, tokens, dtype=base.dtype, device="meta"),
                position_ids=torch.zeros(1, tokens, dtype=torch.int64, device="meta"),
                use_cache=False,
                logits_to_keep=1,
            )
        else:
            one = {"logits_to_keep": 1} if keeps_logits(type(base)) else {}  # type: ignore[arg-type]
            with _OneText():
                plain_logits(model, ids, **one)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _AttentionByKernel(TorchFunctionMode):
    """Scaled dot-product attention keeps what a GPU's kernels do; on meta it is written out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _KernelAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _OneText(TorchFunctionMode):
    """transformers asks tensors whether the ids are one text: they are, and have no numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


class _KernelAttention(Function):
    @staticmethod
    def forward(ctx: Any, query, key, value):
        batch, heads, tokens, _ = query.shape
        # Token by token, as the kernels lay it down: what follows needs no copy of it.
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient):
        raise NotImplementedError("only what is kept for backward is counted here")


def _storage(tensor: torch.Tensor) -> int:
    """Identity of a tensor's memory; meta tensors have no address."""
    return tensor.untyped_storage()._cdata


def _linear_sizes(layer: nn.Module) -> list[int]:
    """Weights of a layer's linear modules, the adapter's excluded."""
    return [
        module.weight.numel()
        for module in layer.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ] or [0]


def _stacks(layer: nn.Module) -> list[list[int]]:
    """Of each module of experts, the weights of its stacks."""
    found = (stacked_parameters(module) for module in layer.modules())
    return [[stack.numel() for stack in stacks.values()] for stacks in found if stacks]


def _with_adapters(layer: nn.Module) -> int:
    """A layer's experts, and the sum or the gradient of the largest stack that has an adapter."""
    adapted = [m for m in layer.modules() if isinstance(m, ParamWrapper)]
    sizes = [module.get_param().numel() for module in adapted if module.num_experts > 1]
    return sum(map(sum, _stacks(layer))) + max(sizes, default=0)


def _idle(layer: nn.Module, config: PretrainedConfig) -> int:
    """Weights of the experts that a token is not sent to; 0 where the settings do not say."""
    used = next(
        (value for name in _USED if isinstance(value := getattr(config, name, None), int)), 0
    )
    idle = 0
    for module in layer.modules():
        for stack in stacked_parameters(module).values():
            idle += stack[0].numel() * max(0, len(stack) - used) if used else 0
    return idle


def _largest_linear(layer: nn.Module, *, is_fused: bool) -> int:
    """Weights of the largest matmul, or of a layer's experts, in numbers."""
    if not is_fused:
        return max(*_linear_sizes(layer), *map(sum, _stacks(layer)), _with_adapters(layer))
    return max(
        sum(member.linear.weight.numel() for member in projections.members)
        for projections in FusedLayer(layer).projections
    )


def _repeated_bytes(layer: nn.Module) -> int:
    """A token's keys and values once for every query head, where these share them."""
    fused = FusedLayer(layer)
    queries, keys, _ = fused.heads
    columns = fused.query_key_value.members[0].columns
    return 2 * fused.dtype.itemsize * (columns.stop - columns.start) if queries != keys else 0


def _frozen(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not p.requires_grad)
