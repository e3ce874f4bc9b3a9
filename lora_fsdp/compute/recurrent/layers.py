"""Which layers of a model are recurrent, whether they can follow a tree, and how they are told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from torch import nn

from lora_fsdp.compute.patches import Patches
from lora_fsdp.compute.recurrent.functions import ALONG_TREE
from lora_fsdp.compute.recurrent.tree import SequenceTree

#: Kinds of layers (`config.layer_types`) that hand a state from token to token.
RECURRENT_KINDS = frozenset({"linear_attention", "conv", "mamba"})
# Every recurrent layer of this form has a convolution along the sequence.
_CONVOLUTION = "causal_conv1d_fn"


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hand a state from token to token by functions known here."""
    return [module for module in model.modules() if _functions_of(module)]


def follows_trees(model: nn.Module) -> bool:
    """Whether a model has recurrent layers that can start from any state, as far as their code
    tells; whether they compute the same is found out on the live model.

    Args:
        model: the causal LM, without adapter; it needs no weights.
    """
    return bool(recurrent_layers(model))


def follow_trees(model: nn.Module, patches: Patches) -> bool:
    """Have the recurrent layers take a `SequenceTree` in the place of the attention mask, which
    every model hands to its layers, also where they are computed again. Without one they compute
    as before.

    Returns:
        whether there are such layers.
    """
    layers = recurrent_layers(model)
    for layer in layers:
        patches.set(
            layer,
            "forward",
            _along_tree(layer, patches),
            why="recurrent states follow the tree of a packed sequence",
        )
    return bool(layers)


def _along_tree(layer: nn.Module, patches: Patches) -> Callable[..., Any]:
    own, code, functions = layer.forward, _code_of(layer), _functions_of(layer)

    def forward(*arguments: Any, attention_mask: Any = None, **settings: Any) -> Any:
        if not isinstance(attention_mask, SequenceTree):
            return own(*arguments, attention_mask=attention_mask, **settings)
        with ExitStack() as replaced:
            for name in functions:
                along = ALONG_TREE[name](getattr(code, name), attention_mask)
                why = "this forward follows a tree"
                replaced.enter_context(patches.for_now(code, name, along, why=why))
            return own(*arguments, attention_mask=None, **settings)

    return forward


def _functions_of(layer: nn.Module) -> list[str]:
    """The functions by which a layer computes along the sequence."""
    if not any(isinstance(child, nn.Conv1d) for child in layer.children()):
        return []
    called = _names_in(layer)
    if _CONVOLUTION not in called:
        return []
    return [name for name in ALONG_TREE if name in called]


def _names_in(layer: nn.Module) -> set[str]:
    """The global names that a layer's forward uses, decorated or not."""
    forward: Any = type(layer).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return set(forward.__code__.co_names)


def _code_of(layer: nn.Module) -> ModuleType:
    return sys.modules[_defining_class(layer).__module__]


def _defining_class(layer: nn.Module) -> type[nn.Module]:
    """The class whose forward a layer has: FSDP gives modules a class of its own."""
    return next(one for one in type(layer).__mro__ if "forward" in vars(one))
