"""Weights with which nothing can be computed, and what is said of them."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_fsdp.base.experts.packed import PackedExperts
from lora_fsdp.base.quantized_layers import QuantizedLayer

# No trained weight comes near it; squared by a norm after a few layers it would overflow.
_LARGEST = 1e9


def unusable_weight(model: nn.Module) -> str | None:
    """What is wrong with the worst weight of a model, as a sentence that begins in the middle.

    Of sharded weights, what this rank holds is looked at; of packed ones nothing. To be asked only
    when something went wrong: every weight is read.

    Args:
        model: with or without an adapter.
    """
    packed = {id(one.weight) for one in model.modules() if isinstance(one, QuantizedLayer)}
    packed |= {
        id(one._parameters[name])
        for one in model.modules()
        if isinstance(one, PackedExperts)
        for name in one.packings
    }
    largest, where = 0.0, ""
    for live_name, parameter in model.named_parameters():
        name = re.sub(r"\.(base_layer|original_module)(?=\.)", "", live_name)
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if id(parameter) in packed or held.is_meta or not held.is_floating_point():
            continue
        if held.numel() == 0:  # a rank's part may be
            continue
        most = float(torch.linalg.vector_norm(held.detach(), torch.inf))
        if most != most or most == torch.inf:
            if ".lora_" in name or ".modules_to_save." in name:
                return (
                    f"the adapter's {name} is not finite. It was saved after its training had "
                    "diverged: take an earlier checkpoint"
                )
            return (
                f"its weight {name} is not finite. The base's files are damaged, or were saved "
                "after a training that diverged: take the original ones"
            )
        if most > largest:
            largest, where = most, name
    if largest > _LARGEST:
        return (
            f"its weight {where} holds {largest:.2g}, so large that what is computed from it "
            "overflows. The base's files are damaged, or were saved after a training that "
            "diverged: take the original ones"
        )
    return None
