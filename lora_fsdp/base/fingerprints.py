"""What a base model and a tokenizer are recognised by, without reading a whole checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Settings of a model that say nothing about what it computes, or that a run may change.
_NOT_THE_MODEL = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "is_decoder",
    "pad_token_id",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_SAMPLED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SAMPLED_VALUES = 4
#: Fixed texts whose tokens a tokenizer must reproduce: scripts, blanks, digits, markup.
_TOKENIZED_TEXTS = (
    "The flight was late, again!",
    " Crème brûlée, 12.50 €\n\tnaïve façade",
    "今日は飛行機が遅れました。 Самолёт опоздал",
    "</s> <|endoftext|> <|im_end|> 🙂",
)


@dataclass(frozen=True)
class BaseFingerprint:
    """What a base model is recognised by.

    Attributes:
        model_class: the class of the model.
        config: its settings that differ from the class's defaults.
        weights: for each tensor, under its name in the model, a digest of its shape and of a few
            values from its beginning, middle and end, rounded to bfloat16: the same whether the
            base was loaded in float32 or bfloat16, and on any device. Quantised tensors are left
            out.
    """

    model_class: str
    config: Mapping[str, Any]
    weights: Mapping[str, str]

    def differences(self, other: BaseFingerprint) -> list[str]:
        """How `other` differs, a sentence each; empty if it is the same model."""
        found = []
        if self.model_class != other.model_class:
            found.append(f"it is a {other.model_class} and not a {self.model_class}")
        for key in sorted(self.config.keys() & other.config.keys()):
            if self.config[key] != other.config[key]:
                found.append(f"its {key} is {other.config[key]!r} and not {self.config[key]!r}")
        common = self.weights.keys() & other.weights.keys()
        wrong = sorted(name for name in common if self.weights[name] != other.weights[name])
        if wrong:
            found.append(
                f"{len(wrong)} of {len(common)} sampled weights differ (for example {wrong[0]})"
            )
        if not common:
            found.append("none of its weights can be compared")
        return found


def fingerprint_base(model: PreTrainedModel | PeftModel) -> BaseFingerprint:
    """The fingerprint of a live base, with or without an adapter. To be taken before it is sharded:
    then no rank needs to gather anything.
    """
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    weights = {
        name: sample_digest(tuple(parameter.shape), parameter.detach().__getitem__)
        for name, parameter in base_parameters(base)
        # Quantised ones are of a class of their own.
        if parameter.dtype in _SAMPLED_DTYPES and type(parameter) is nn.Parameter
    }
    return BaseFingerprint(type(base).__name__, comparable_config(base.config.to_dict()), weights)


def base_parameters(base: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's own parameters under the names they have without an adapter."""
    for name, parameter in base.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        yield re.sub(r"\.(base_layer|original_module)(?=\.)", "", name), parameter


def sample_digest(shape: Sequence[int], read: Callable[[tuple[slice, ...]], torch.Tensor]) -> str:
    """Of a tensor's shape and a few of its values.

    Args:
        shape: the tensor's.
        read: gives the part of the tensor that slices, one a dimension, cut out.
    """
    digest = hashlib.sha256(str(list(shape)).encode())
    if shape and all(shape):
        first, rest = shape[0], shape[1:]
        length = 1 if rest else _SAMPLED_VALUES
        inner = tuple(slice(0, 1) for _ in rest[:-1])
        inner += (slice(0, _SAMPLED_VALUES),) if rest else ()
        for start in dict.fromkeys((0, first // 2, first - length)):
            begin = max(start, 0)
            part = read((slice(begin, min(begin + length, first)), *inner))
            rounded = part.to("cpu", torch.float32).to(torch.bfloat16).flatten().contiguous()
            digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def comparable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a model what it is, as JSON has them."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            str(key): kept(inner)
            for key, inner in value.items()
            if str(key) not in _NOT_THE_MODEL and not str(key).startswith("_") and inner is not None
        }

    return json.loads(json.dumps(kept(dict(config)), default=str, sort_keys=True))


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, the added tokens and the tokens of a few fixed texts.

    The chat template is left out: it may be given to a tokenizer afterwards.
    """
    added = sorted(
        (index, token.content, token.special)
        for index, token in tokenizer.added_tokens_decoder.items()
    )
    texts = tokenizer(list(_TOKENIZED_TEXTS), add_special_tokens=True)["input_ids"]
    contents = [sorted(tokenizer.get_vocab().items()), added, [list(ids) for ids in texts]]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def same_vocabulary(base: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether every token of `base` has the same id in `other`, which may have further ones."""
    vocabulary = other.get_vocab()
    return all(vocabulary.get(token) == index for token, index in base.get_vocab().items())
