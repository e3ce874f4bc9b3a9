"""Checkpoint to tokenizer and base model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.folders import check_weight_indices
from lora_fsdp.base.multimodal import auto_class
from lora_fsdp.errors import (
    ArgumentError,
    LoraFsdpError,
    ModelNotFoundError,
    TokenizerNotFoundError,
    UnsupportedModelError,
)

logger = logging.getLogger(__name__)

_ON_FIRST_RANK_ONLY = "FSDP_CPU_RAM_EFFICIENT_LOADING"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
#: What a config.json that is no causal language model's, or a damaged .bin file, makes
#: transformers and torch raise.
LOADING_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    UnpicklingError,
    ValueError,
)
#: Attention that takes the 4-D mask of packed sequences.
_MASKED_ATTENTION = ("sdpa", "eager")


def load_tokenizer(arguments: ModelArguments) -> Tokenizer:
    """The model's tokenizer, with a padding token for batched generation.

    A padding token that equals the end token is harmless here: labels are masked by position,
    never by token id.
    """
    name = existing_model(arguments)
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in TOKENIZER_FILES):
        raise TokenizerNotFoundError(
            f"The model folder {name} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}): "
            "copy the tokenizer's files of the same model into it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        # What its settings break, they break here, and not in the middle of a run.
        tokenizer(["Does it work?"], add_special_tokens=False)
        tokenizer("Does it work?")
    except Exception as error:  # a damaged file gives a plain Exception of the Rust library
        raise TokenizerNotFoundError(
            f"No tokenizer could be loaded from {name}: {first_line(error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(arguments: ModelArguments, *, device: torch.device) -> PreTrainedModel:
    """The frozen base in host memory, in the dtype it will be used in on `device`.

    Raises:
        ModelNotFoundError: there is no such model, or its weights are damaged or incomplete.
        UnsupportedModelError: it is not a causal language model, or cannot run as asked.
    """
    name = existing_model(arguments)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelNotFoundError(f"The folder {name} holds no model (config.json is missing).")
    if arguments.load_in_4bit:
        raise ArgumentError(
            "load_base loads whole bases in the dtype asked for: for load_in_4bit use "
            "lora_fsdp.base.streaming.load_on_device."
        )
    warn_of_remote_code(arguments)
    if Path(name).is_dir():
        check_weight_indices(Path(name))
    model, absent, misshapen = _load_weights(
        arguments, name, dtype=resolve_dtype(arguments.dtype, device=device)
    )
    # transformers fills missing weights with random ones and says so in a log line only.
    if misshapen:
        raise ModelNotFoundError(
            f"{len(misshapen)} weights of {name} have other shapes than its config.json says, or "
            f"lack a part (for example {misshapen[0]}): it is incomplete, or its config.json is "
            "another model's."
        )
    if absent:
        raise ModelNotFoundError(
            f"The checkpoint {name} lacks {len(absent)} of the weights of {type(model).__name__} "
            f"(for example {absent[0]}): it is incomplete, or not a causal language model's."
        )
    check_attention(model, name)
    return model.requires_grad_(False)


def _load_weights(
    arguments: ModelArguments, name: str, *, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """The model, the weights that its files lack, and those that they have in another shape."""
    attention = arguments.attn_implementation
    model: PreTrainedModel
    loaded: dict[str, Any]
    try:
        with _weights_on_every_rank():
            model, loaded = _maker(arguments, name).from_pretrained(
                name,
                revision=arguments.model_revision,
                dtype=dtype,
                attn_implementation=None if attention == "auto" else attention,
                trust_remote_code=arguments.trust_remote_code,
                weights_only=True,  # should the weights be a pickle: nothing in it is run
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
    except LoraFsdpError:
        raise
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(f"No model could be loaded from {name}: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except UnpicklingError as error:  # whose text tells the reader to set weights_only=False
        raise UnsupportedModelError(
            f"The weights of {name} are a damaged pickle, or one that holds more than tensors and "
            "could run code when it is opened: it is not opened. Use the model's safetensors files."
        ) from error
    except LOADING_ERRORS as error:
        if "CONVERSION" in str(error):  # transformers prints which before
            raise ModelNotFoundError(
                f"The weights of {name} do not fit each other, or some are missing: transformers "
                "cannot put them together. lora-fsdp doctor names them; download the model again."
            ) from error
        raise UnsupportedModelError(
            f"{name} cannot be loaded as a causal language model: {first_line(error)}"
        ) from error
    misshapen = [
        f"{key}: {list(stored)} instead of {list(wanted)}"
        for key, stored, wanted in sorted(loaded["mismatched_keys"])
    ]
    return model, sorted(loaded["missing_keys"]), misshapen


def _maker(arguments: ModelArguments, name: str) -> Any:
    config = AutoConfig.from_pretrained(
        name, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
    )
    return auto_class(config)


@contextmanager
def _weights_on_every_rank() -> Iterator[None]:
    """As if the YAML said `fsdp_cpu_ram_efficient_loading: false`, which the launcher leaves true.

    By that setting transformers gives weights to the first rank of a machine only, for accelerate's
    FSDP to send them to the others. This library shards what each rank has read.
    """
    asked = os.environ.pop(_ON_FIRST_RANK_ONLY, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_ON_FIRST_RANK_ONLY] = asked


def warn_of_remote_code(arguments: ModelArguments) -> None:
    """Say that code which comes with the model may run."""
    if arguments.trust_remote_code:
        logger.warning(
            "trust_remote_code is on: Python code that comes with %s may run on this machine.",
            existing_model(arguments),
        )


def check_attention(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose attention takes no mask for packed sequences."""
    if model.config._attn_implementation not in _MASKED_ATTENTION:
        raise UnsupportedModelError(
            f"{name} runs with {model.config._attn_implementation} attention, which takes no mask "
            "for packed sequences: set --attn_implementation eager."
        )


def first_line(error: Exception) -> str:
    """Of what an error says; transformers goes on to list every architecture there is."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:500]


def resolve_dtype(name: str, *, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def existing_model(arguments: ModelArguments) -> str:
    """The folder of the model, or its name on the Hub."""
    name = arguments.model_name_or_path
    if not name:
        raise ArgumentError("No model given: set --model_name_or_path to a folder or Hub name.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(
            f"There is no model folder {folder.absolute()}: check the path, or give a Hub name "
            "such as deepseek-ai/deepseek-llm-7b-base."
        )
    return name
