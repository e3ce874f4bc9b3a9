"""Where a causal language model has its parts: the base under an adapter, its decoder layers."""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lora_fsdp.errors import UnsupportedModelError


def base_model(model: PeftModel) -> PreTrainedModel:
    """The base under an adapter."""
    return cast(PreTrainedModel, model.get_base_model())


def decoder_layers(base: nn.Module) -> list[nn.Module]:
    """The decoder layers of any causal LM.

    The list of modules whose class the model names in `_no_split_modules`, or else the list with
    the most parameters.

    Raises:
        UnsupportedModelError: the model has no list of modules.
    """
    modules = (module for module in base.modules() if isinstance(module, nn.ModuleList))
    lists = [list(module) for module in modules if len(module) > 0]
    unsplittable = set(getattr(base, "_no_split_modules", None) or ())
    named = [layers for layers in lists if {type(one).__name__ for one in layers} <= unsplittable]
    if not lists:
        raise UnsupportedModelError(
            f"No list of decoder layers was found in {type(base).__name__}: name their class in "
            "the accelerate YAML (fsdp_transformer_layer_cls_to_wrap)."
        )
    return max(
        named or lists,
        key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()),
    )
