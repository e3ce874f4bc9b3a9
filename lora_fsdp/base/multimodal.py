"""Models that also see or hear: their language model, and the parts that a text does not need."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from lora_fsdp.errors import UnsupportedModelError
from lora_fsdp.ranks import rank

logger = logging.getLogger(__name__)


def auto_class(config: PretrainedConfig) -> Any:
    """The `AutoModel...` class that makes the model which was published with a config.

    Adapters name modules as they are called in that class. A multimodal model may also be mapped to
    its language model alone, in which they are called otherwise.

    Raises:
        UnsupportedModelError: it is an encoder with a decoder.
    """
    published = config.architectures or []
    makers: list[Any] = [
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    ]
    made = {maker: maker._model_mapping.get(type(config), None) for maker in makers}
    if config.is_encoder_decoder and made[AutoModelForCausalLM] is None:
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder with a decoder: choose a causal language model."
        )
    for maker, model_class in made.items():
        classes = model_class if isinstance(model_class, tuple) else (model_class,)
        if any(one is not None and one.__name__ in published for one in classes):
            return maker
    multimodal = [maker for maker in makers[1:] if made[maker] is not None]
    if made[AutoModelForCausalLM] is None and config.get_text_config() is not config:
        return next(iter(multimodal), AutoModelForCausalLM)
    return AutoModelForCausalLM


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether the model has a language model with settings of its own."""
    return model.config.get_text_config() is not model.config


def outside_text(model: nn.Module) -> list[str]:
    """Names of the modules beside the language model and the head; none if there is no other part.

    Only the outermost of each part is named.
    """
    if not isinstance(model, PreTrainedModel) or not is_multimodal(model):
        return []
    inside = {id(module) for module in (model.get_decoder(), model.get_output_embeddings())}
    found: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    of_text = [names[one] for one in inside if one in names]
    for name, _ in model.named_modules():
        around = any(text == name or text.startswith(f"{name}.") or not name for text in of_text)
        within = any(name.startswith(f"{other}.") for other in (*of_text, *found))
        if not around and not within:
            found.append(name)
    return found


def towers(model: nn.Module) -> list[str]:
    """Names of the parts that are models of their own (for images, sounds), which no text runs."""
    return [
        name
        for name in outside_text(model)
        if isinstance(model.get_submodule(name), PreTrainedModel)
    ]


def names_outside(config: LoraConfig | None, parts: Iterable[str]) -> bool:
    """Whether an adapter's settings ask for a module of these parts by the part's name."""
    if config is None:
        return False
    said = [*_listed(config.target_modules), *_listed(config.target_parameters)]
    said += _listed(config.modules_to_save)
    return any(part.rpartition(".")[2] in text for part in parts for text in said)


def drop_towers(model: PreTrainedModel, *, adapter: LoraConfig | None, say: bool = True) -> None:
    """Take out what a text does not run, so that it need not be read, unless the adapter is there.

    Args:
        model: perhaps without weights; changed in place.
        adapter: the settings of the adapter that will be attached, if they are known.
        say: put a line into the log.
    """
    found = towers(model)
    if not found or names_outside(adapter, found):
        return
    size = 0
    for name in found:
        part = model.get_submodule(name)
        size += sum(value.numel() * value.element_size() for value in part.parameters())
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, None)
    if say and rank() == 0:
        logger.warning(
            "Not read, because a text does not need it: %s (%.2f GB).", ", ".join(found), size / 1e9
        )


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
