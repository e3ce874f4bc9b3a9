"""The frozen base in FSDP2 shards, the adapter outside them.

Only the base is sharded. The adapter stays a plain tensor on every rank (`ignored_params`), so that
the base's groups never hold anything that changes: their weights cannot go stale, saving needs no
gather, and the optimizer's state does not depend on the number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.layers import base_model, decoder_layers
from lora_fsdp.base.streaming import StoredBase
from lora_fsdp.errors import FsdpDroppedError, FsdpSettingError
from lora_fsdp.placement.layout import Layout


def place_model(
    model: PeftModel,
    *,
    layers: Sequence[nn.Module],
    layout: Layout,
    settings: FsdpSettings | None,
    device: torch.device,
    stored: StoredBase | None = None,
) -> frozenset[nn.Parameter]:
    """Put base and adapter where they stay for the run, in place.

    With `settings` what is not resident is sharded over the ranks that share a copy, layer by
    layer, so no rank ever holds more of it than its shard and the layers in flight; without, or
    with the whole base resident, each rank keeps a whole copy. Weights that the model lacks yet are
    read from `stored` once it is sharded.

    Returns:
        the base's parameters that every rank holds whole.
    """
    base, adapter = base_model(model), frozenset(trainable_parameters(model).values())
    sharded = settings is not None and layout.gathers(len(layers))
    kept = _kept_whole(base, layers, layout) if sharded else [base]
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    if stored is not None:
        stored.fill(kept, device=device, keep_on=device)
    for module in kept:
        module.to(device)
    whole = frozenset(p for module in kept for p in module.parameters()) - adapter
    if settings is None or not sharded:
        return whole
    shard_base(
        base,
        settings=settings,
        mesh=mesh_of(layout, device),
        ignored=whole | adapter,
        groups=[layer for layer in layers if layer not in kept],
    )
    if stored is not None:
        keep_on = torch.device("cpu") if settings.offload else device
        stored.fill([base], device=device, keep_on=keep_on)
    return whole


def mesh_of(layout: Layout, device: torch.device) -> DeviceMesh:
    """The ranks as torch shards over them: those that share a copy are a row.

    Ranks are numbered host by host, so that a row lies on one host where as many ranks as it has
    share a copy. Nothing is ever summed between the rows: a frozen weight has no gradient.
    """
    if layout.replicas == 1:
        return init_device_mesh(device.type, (layout.ranks,))
    return init_device_mesh(
        device.type,
        (layout.replicas, layout.sharers),
        mesh_dim_names=("replicate", "shard"),
    )


def _kept_whole(
    base: PreTrainedModel, layers: Sequence[nn.Module], layout: Layout
) -> list[nn.Module]:
    """The modules that every rank keeps, where it does not keep all."""
    kept = [layers[index] for index in layout.resident_of(len(layers))]
    return [*kept, base.get_output_embeddings()] if layout.whole_head else kept


def shard_base(
    base: PreTrainedModel,
    *,
    settings: FsdpSettings,
    mesh: DeviceMesh,
    ignored: frozenset[nn.Parameter],
    groups: Sequence[nn.Module],
) -> None:
    """Apply `fully_shard` to the layers in `groups`, the embeddings, the head, and what is left.

    Embeddings and a head that share a weight (also if PEFT keeps a trained copy of one beside it)
    stay together in the root group, because torch refuses a parameter that two groups can see.
    Parameters in `ignored` stay as they are.
    """
    _refuse_integers(base)
    offload = CPUOffloadPolicy() if settings.offload and mesh.device_type != "cpu" else None
    options = {
        "mesh": mesh,
        "ignored_params": set(ignored),
        "offload_policy": offload or OffloadPolicy(),
        "reshard_after_forward": settings.reshard_after_forward,
    }
    if settings.wrap_layers:
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        chosen = list(groups)
        ends = [module for module in (embedding, head) if module is not None]
        shared = _shared_parameters([*groups, *ends])
        for module in ends:
            own = set(module.parameters()) - ignored
            if own and not own & shared:
                chosen.append(module)
        for module in chosen:
            fully_shard(module, **options)  # type: ignore[call-overload]
            if module is embedding:  # looking tokens up needs no table in backward
                cast(FSDPModule, module).set_unshard_in_backward(False)
    # The root is needed again at once in backward, so it is never resharded in between.
    fully_shard(base, **{**options, "reshard_after_forward": False})  # type: ignore[call-overload]
    if settings.wrap_layers:
        _prefetch(groups)


def _shared_parameters(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Parameters that several of the modules have, under whatever name."""
    counts = Counter(p for module in modules for p in set(module.parameters()))
    return {parameter for parameter, count in counts.items() if count > 1}


def _refuse_integers(base: nn.Module) -> None:
    """FSDP2 leaves integers out of its shards, or makes NaN of them, without an error."""
    for name, parameter in base.named_parameters():
        if not parameter.is_floating_point():
            raise FsdpSettingError(
                f"The base's {name} is stored as {parameter.dtype}, which FSDP2 cannot shard: set "
                "bnb_4bit_quant_storage in its quantization_config to the dtype it computes in, "
                "or start from the unquantised base with --load_in_4bit."
            )


def _prefetch(groups: Sequence[nn.Module]) -> None:
    """Gather the next group while one computes, in both directions."""
    for earlier, later in pairwise(groups):
        cast(FSDPModule, earlier).set_modules_to_forward_prefetch([cast(FSDPModule, later)])
        cast(FSDPModule, later).set_modules_to_backward_prefetch([cast(FSDPModule, earlier)])


def layers_to_shard(base: nn.Module, *, names: tuple[str, ...] | None) -> list[nn.Module]:
    """The modules that form an FSDP group each: those of the named classes, or the decoder layers.

    Raises:
        FsdpSettingError: the named classes do not occur in the model.
    """
    if names is None:
        return decoder_layers(base)
    found = [module for module in base.modules() if type(module).__name__ in names]
    absent = set(names) - {type(module).__name__ for module in found}
    if absent:
        present = sorted({type(layer).__name__ for layer in decoder_layers(base)})
        raise FsdpSettingError(
            f"fsdp_transformer_layer_cls_to_wrap: {', '.join(sorted(absent))} does not occur in "
            f"{type(base).__name__}; its layers are {', '.join(present)} (or leave the key out)."
        )
    return found


def release_gathered(model: PeftModel) -> None:
    """Free what a forward without a backward leaves gathered.

    That is the root group, and every layer if the YAML says `fsdp_reshard_after_forward: false`; in
    training their backward frees them. To be called on every rank or on none.
    """
    for module in base_model(model).modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def forget_broken_off_step(model: nn.Module) -> bool:
    """Have FSDP take the next forward for a new step's, where one was broken off in the middle.

    Returns:
        whether that can be done: torch offers it from 2.13 on.
    """
    root = next(module for module in model.modules() if isinstance(module, FSDPModule))
    if not hasattr(root, "reset_iter_state"):
        return False
    root.reset_iter_state()
    return True


def check_placement(model: PeftModel, *, resident: Collection[nn.Parameter]) -> None:
    """Check on the live model that sharding, replication and dtypes are what they must be.

    Args:
        model: the placed model.
        resident: the base's parameters that every rank must hold whole; the others must be sharded.

    Raises:
        FsdpDroppedError: names the parameter that is not where, or not of the dtype, it should be.
    """
    adapter = trainable_parameters(model)
    if not adapter:
        raise FsdpDroppedError(
            "The model has no parameter to train: load an adapter with is_trainable=True."
        )
    base = {name: p for name, p in model.named_parameters() if name not in adapter}
    for name, parameter in adapter.items():
        if isinstance(parameter, DTensor) or parameter.dtype != torch.float32:
            raise FsdpDroppedError(
                f"The adapter's {name} should be a float32 tensor on every rank, but is "
                f"{type(parameter.data).__name__} of {parameter.dtype}."
            )
    kept = set(resident)  # by identity
    for name, parameter in base.items():
        if isinstance(parameter, DTensor) == (parameter in kept):
            state = "is sharded, not whole" if parameter in kept else "is not sharded"
            raise FsdpDroppedError(f"The base's {name} {state}.")
    dtypes = {parameter.dtype for parameter in base.values() if parameter.is_floating_point()}
    if len(dtypes) > 1:
        raise FsdpDroppedError(
            f"The base's parameters have several dtypes: {sorted(map(str, dtypes))}"
        )
