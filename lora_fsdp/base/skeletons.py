"""A base's model without its weights, and what each parameter is called in the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.loading import (
    LOADING_ERRORS,
    check_attention,
    existing_model,
    warn_of_remote_code,
)
from lora_fsdp.base.stored_weights import PLAIN_DTYPES, BaseWeights, base_folder, stored_names
from lora_fsdp.errors import ModelNotFoundError, UnsafeFileError


class CannotStreamError(Exception):
    """A base cannot be read tensor by tensor; the message gives the reason as half a sentence.

    Always caught: the base is then loaded whole, or refused with a message of its own.
    """


def empty_base(
    arguments: ModelArguments, *, dtype: torch.dtype
) -> tuple[PreTrainedModel, BaseWeights, dict[str, str]]:
    """The model with its parameters on the meta device, its files, and their names for them.

    Everything else is what `from_pretrained` would give: settings, buffers, generation settings.

    Raises:
        CannotStreamError: the files do not hold each parameter as the model has it, or the model
            cannot be built without them; transformers then either loads it or says what is wrong.
        UnsupportedModelError: its attention takes no mask for packed sequences.
    """
    name = existing_model(arguments)
    try:
        weights = BaseWeights(base_folder(name, revision=arguments.model_revision))
    except (ModelNotFoundError, UnsafeFileError) as error:
        raise CannotStreamError("its weights are in no complete safetensors files") from error
    model = _empty_model(arguments, name, dtype=dtype)
    names = stored_names(model, weights.tensors)
    if reason := next(_obstacles(model, weights, names), None):
        raise CannotStreamError(reason)
    for buffer_name, buffer in _saved_buffers(model):
        buffer.copy_(weights.read(buffer_name))
    check_attention(model, name)
    warn_of_remote_code(arguments)
    return model, weights, names


def _empty_model(arguments: ModelArguments, name: str, *, dtype: torch.dtype) -> PreTrainedModel:
    attention = arguments.attn_implementation
    try:
        config = AutoConfig.from_pretrained(
            name,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        if "quantization_config" in config.to_dict():
            raise CannotStreamError("it is quantised already")
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
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


def _obstacles(
    model: PreTrainedModel, weights: BaseWeights, names: Mapping[str, str]
) -> Iterator[str]:
    """Why the files do not hold each tensor as the model has it."""
    kind = type(model).__name__
    if any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(model)):
        yield f"{kind} has other tensors than its files"
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        yield f"{kind} keeps some modules in float32"
    for target, source in model.all_tied_weights_keys.items():
        if {target, source} <= weights.tensors.keys():
            yield f"its files hold both {target} and {source}, which the model shares"
    for name, parameter in model.named_parameters():
        if name not in names:
            yield f"its files hold no {name}"
            continue
        stored = weights.tensors[names[name]]
        if stored.shape != tuple(parameter.shape) or stored.dtype not in PLAIN_DTYPES:
            yield f"its files hold {name} in another shape or as {stored.dtype}"
    for name, _ in _saved_buffers(model):
        if name not in weights.tensors:
            yield f"its files hold no {name}"


def _saved_buffers(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Those that are saved with a model; the others were computed when it was built."""
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in computed]
