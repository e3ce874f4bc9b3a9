"""A base of any size without files: every rank draws its own shard's weights where they stay.

Nothing larger than a shard exists anywhere (in 4 bits: than one tensor), so a 70B shape is there in
seconds. The weights are random: good for time and memory, and for nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from math import prod

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lora_fsdp.base.fingerprints import (
    BaseFingerprint,
    base_parameters,
    comparable_config,
    sample_digest,
)
from lora_fsdp.base.streaming import StoredBase

_DEVIATION = 0.02


class RandomWeights:
    """Stands where the files of a base are read: values of a normal distribution, norms of one.

    What is drawn depends on the parameter's name and on which part is asked for, and not on the
    rank: copies of a shard are equal.

    Args:
        model: on the meta device.
        device: where to draw.
    """

    def __init__(self, model: PreTrainedModel, *, device: torch.device) -> None:
        self._model, self._device = model, device
        self._shapes = {name: tuple(value.shape) for name, value in base_parameters(model)}
        self._order = {name: place for place, name in enumerate(self._shapes)}

    def place(self, name: str) -> int:
        """Where in the model a parameter is."""
        return self._order[name]

    def is_read_in_parts(self, name: str) -> bool:
        """Drawn where it stays, at once: nothing is copied that threads could share."""
        return False

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter."""
        return self.reader(name)(())

    def reader(self, name: str) -> Callable[[tuple[slice, ...]], torch.Tensor]:
        """Draws parts of a parameter."""
        shape = self._shapes[name]

        def draw(part: tuple[slice, ...]) -> torch.Tensor:
            bounds = [one.indices(size) for one, size in zip(part, shape, strict=False)]
            sizes = [end - begin for begin, end, _ in bounds] + list(shape[len(part) :])
            if len(shape) == 1:
                return torch.ones(sizes, dtype=self._model.dtype, device=self._device)
            generator = torch.Generator(self._device)
            generator.manual_seed(zlib.crc32(f"{name}{bounds}".encode()))
            drawn = torch.empty(sizes, dtype=self._model.dtype, device=self._device)
            return drawn.normal_(std=_DEVIATION, generator=generator)

        return draw

    def first_values(self, name: str, count: int) -> torch.Tensor:
        """The first `count` values of a parameter, flat."""
        rows = -(-count // max(1, prod(self._shapes[name][1:])))
        return self.reader(name)((slice(0, rows),)).flatten()[:count].cpu()

    def fingerprint(self) -> BaseFingerprint:
        """Of the base, as that of a stored one."""
        digests = {
            name: sample_digest(shape, lambda part, name=name: self.reader(name)(part).cpu())
            for name, shape in self._shapes.items()
        }
        config = comparable_config(self._model.config.to_dict())
        return BaseFingerprint(type(self._model).__name__, config, digests)


def random_base(
    config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device, in_4bit: bool
) -> StoredBase:
    """A base of this shape, of which nothing is there yet.

    Raises:
        UnsupportedModelError: it cannot be kept in 4 bits.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.requires_grad_(False)
    weights = RandomWeights(model, device=device)
    if in_4bit:
        from lora_fsdp.base.four_bit import replace_linear_layers

        replace_linear_layers(model, dtype=dtype)
    return StoredBase(model, weights)  # type: ignore[arg-type]
