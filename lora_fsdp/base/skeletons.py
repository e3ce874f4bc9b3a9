"""A base's model without its weights, and what its files hold for each parameter."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from typing import cast

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.conversion.low_precision import (
    LowPrecisionWeights,
    Published,
    open_weights,
    published_in,
)
from lora_fsdp.base.conversion.model_weights import ModelWeights
from lora_fsdp.base.loading import (
    LOADING_ERRORS,
    check_attention,
    existing_model,
    warn_of_remote_code,
)
from lora_fsdp.base.multimodal import auto_class, drop_towers
from lora_fsdp.base.stored_weights import PLAIN_DTYPES, base_folder
from lora_fsdp.errors import ModelNotFoundError, UnsafeFileError
from lora_fsdp.ranks import rank

logger = logging.getLogger(__name__)


class CannotStreamError(Exception):
    """A base cannot be read tensor by tensor; the message gives the reason as half a sentence.

    Always caught: the base is then loaded whole, or refused with a message of its own.
    """


def empty_base(
    arguments: ModelArguments, *, dtype: torch.dtype, adapter: LoraConfig | None = None
) -> tuple[PreTrainedModel, ModelWeights]:
    """The model with its parameters on the meta device, and its weights, not read yet.

    Everything else is what `from_pretrained` would give: settings, buffers, generation settings.
    Only what a text does not run (an encoder of images, say) is left out, unless the adapter is
    there.

    Raises:
        CannotStreamError: the files lack a parameter, or the model cannot be built without them;
            transformers then either loads it or says what is wrong.
        UnsupportedModelError: its attention takes no mask for packed sequences.
    """
    name = existing_model(arguments)
    config = _config(arguments, name)
    published = published_in(getattr(config, "quantization_config", None))
    try:
        folder = base_folder(name, revision=arguments.model_revision)
        stored = open_weights(folder, published)
    except (ModelNotFoundError, UnsafeFileError) as error:
        raise CannotStreamError("its weights are in no complete safetensors files") from error
    if published is not None:
        del config.quantization_config  # of the files, and not of what is read from them
    model = _empty_model(arguments, name, config, dtype=dtype)
    drop_towers(model, adapter=adapter)
    weights = ModelWeights(model, stored)
    if reason := next(_obstacles(model, weights, dtype), None):
        raise CannotStreamError(reason)
    for buffer_name, buffer in _saved_buffers(model):
        buffer.data = weights.read(buffer_name).to(_kept_dtype(model, buffer_name, buffer, dtype))
    check_attention(model, name)
    warn_of_remote_code(arguments)
    if isinstance(stored, LowPrecisionWeights) and published is not None and rank() == 0:
        _say_what_unpacking_costs(model, stored, published, four_bit=arguments.load_in_4bit)
    return model, weights


def _say_what_unpacking_costs(
    model: PreTrainedModel, stored: LowPrecisionWeights, published: Published, *, four_bit: bool
) -> None:
    numbers = sum(prod(stored.tensors[name].shape) for name in stored.unpacked)
    logger.warning(
        "The base's files are in %s, which no kernel here computes from: %.3g GB of them are "
        "unpacked while they are read and take %s.",
        published.name,
        stored.packed_bytes / 1e9,
        f"{numbers * 0.52 / 1e9:.3g} GB in 4 bits, into which they are rounded once more"
        if four_bit
        else f"{numbers * model.dtype.itemsize / 1e9:.3g} GB (with --load_in_4bit true "
        f"{numbers * 0.52 / 1e9:.3g} GB)",
    )


def _config(arguments: ModelArguments, name: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(
            name,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
        )
    except (OSError, *LOADING_ERRORS) as error:
        raise CannotStreamError("transformers cannot build it without its weights") from error
    return cast(PretrainedConfig, config)


def _empty_model(
    arguments: ModelArguments, name: str, config: PretrainedConfig, *, dtype: torch.dtype
) -> PreTrainedModel:
    attention = arguments.attn_implementation
    if "quantization_config" in config.to_dict():
        raise CannotStreamError("it is quantised already")
    try:
        # What nobody will read is not drawn either: half of the time that the model takes to build.
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = auto_class(config).from_config(
                config,
                dtype=dtype,
                attn_implementation=None if attention == "auto" else attention,
                trust_remote_code=arguments.trust_remote_code,
            )
        if not type(model).__module__.startswith("transformers."):
            raise CannotStreamError("its code is not transformers' own")
        # Without a file of its own it is made from the model's settings, which has been done.
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(
                name, revision=arguments.model_revision
            )
    except (OSError, *LOADING_ERRORS) as error:
        raise CannotStreamError("transformers cannot build it without its weights") from error
    model.tie_weights()
    return model.requires_grad_(False).eval()


def _obstacles(model: PreTrainedModel, weights: ModelWeights, dtype: torch.dtype) -> Iterator[str]:
    """Why a tensor cannot be read as the model has it."""
    for target, source in model.all_tied_weights_keys.items():
        if weights.sources(target) != weights.sources(source) if target in weights else False:
            yield f"its files hold both {target} and {source}, which the model shares"
    for name, parameter in model.named_parameters():
        if name not in weights:
            yield f"its files hold no {name}"
            continue
        if weights.shapes[name] != tuple(parameter.shape) or not (
            weights.dtypes(name) <= PLAIN_DTYPES.keys()
        ):
            yield f"its files hold {name} in another shape or as {weights.dtypes(name)}"
        if _kept_dtype(model, name, parameter, dtype) != parameter.dtype:
            yield f"{type(model).__name__} keeps {name} in float32"
    for name, _ in _saved_buffers(model):
        if name not in weights:
            yield f"its files hold no {name}"


def _kept_dtype(
    model: PreTrainedModel, name: str, tensor: torch.Tensor, dtype: torch.dtype
) -> torch.dtype:
    """In which dtype transformers keeps a tensor of a model that is loaded in `dtype`."""
    kept = model._get_dtype_plan(dtype)
    found = next((kept[part] for part in kept if re.search(part, name)), None)
    return found or tensor.dtype


def _saved_buffers(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Those that are saved with a model; the others were computed when it was built."""
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in computed]
