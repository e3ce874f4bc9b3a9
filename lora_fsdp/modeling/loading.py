"""Checkpoint to tokenizer and base model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.errors import (
    ArgumentError,
    ModelNotFoundError,
    TokenizerNotFoundError,
    UnsupportedModelError,
)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_tokenizer(arguments: ModelArguments) -> Tokenizer:
    """The model's tokenizer, with a padding token for batched generation.

    A padding token that equals the end token is harmless here: labels are masked by position,
    never by token id.
    """
    name = _existing_model(arguments)
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in _TOKENIZER_FILES):
        raise TokenizerNotFoundError(
            f"The model folder {name} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): "
            "copy the tokenizer's files of the same model into it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
        )
    except OSError as error:
        raise TokenizerNotFoundError(
            f"No tokenizer could be loaded from {name}: {error}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(arguments: ModelArguments, *, device: torch.device) -> PreTrainedModel:
    """The frozen base in host memory, in the dtype it will be used in on `device`."""
    name = _existing_model(arguments)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=arguments.model_revision,
            dtype=resolve_dtype(arguments.dtype, device=device),
            attn_implementation=arguments.attn_implementation,
            trust_remote_code=arguments.trust_remote_code,
        )
    except OSError as error:
        raise ModelNotFoundError(f"No model could be loaded from {name}: {error}") from error
    except ValueError as error:
        raise UnsupportedModelError(f"{name} is not a causal language model: {error}") from error
    return model.requires_grad_(False)


def resolve_dtype(name: str, *, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def _existing_model(arguments: ModelArguments) -> str:
    name = arguments.model_name_or_path
    if not name:
        raise ArgumentError("No model given: set --model_name_or_path to a folder or Hub name.")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).expanduser().is_dir():
        raise ModelNotFoundError(
            f"There is no model folder {Path(name).expanduser().absolute()}: check the path, or "
            "give a Hub name such as deepseek-ai/deepseek-llm-7b-base."
        )
    return str(Path(name).expanduser()) if looks_like_path else name
