"""A base's weights as its model has them, read from files that may hold them otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lora_fsdp.base.conversion.transforms import Conversion, conversions
from lora_fsdp.base.fingerprints import (
    BaseFingerprint,
    base_parameters,
    comparable_config,
    sample_digest,
)
from lora_fsdp.base.stored_weights import PLAIN_DTYPES, BaseWeights

#: Which part of a tensor: a number or a slice for each of its first dimensions.
Part = tuple[int | slice, ...]
Slices = tuple[slice, ...]
#: What tensors that do not fit each other make a conversion raise.
CONVERSION_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


class ModelWeights:
    """Parameters and saved buffers of a model, by the model's names for them.

    Of experts that are stored one by one and that the model holds in one tensor, only those are
    read that are asked for. What is converted in another way is converted whole, one parameter
    (or several that are stored as one) at a time.

    Args:
        model: perhaps without weights, and without an adapter.
        stored: its files.

    Attributes:
        stored: the files.
        shapes: by the model's names. A parameter is left out if the files lack it, or a part of it,
            or if its parts do not fit each other.
        left_over: names of stored tensors that the model has no place for.
    """

    def __init__(self, model: PreTrainedModel, stored: BaseWeights) -> None:
        self.stored = stored
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._model = model
        self._conversions: dict[str, Conversion] = {}
        self._called: dict[str, str] = {}
        self._converted: tuple[Conversion, Mapping[str, torch.Tensor]] | None = None
        known = set(model.state_dict())
        found = conversions(model, stored.tensors)
        for one in found:
            for name, shape in _shapes(one, model, stored).items():
                if name in known:
                    self.shapes[name], self._conversions[name] = shape, one
        for target, source in model.all_tied_weights_keys.items():
            # Of two parameters that are one, files may hold either.
            for name, other in ((source, target), (target, source)):
                if name not in self.shapes and other in self.shapes:
                    self.shapes[name] = self.shapes[other]
                    self._conversions[name] = self._conversions[other]
                    self._called[name] = other
        used = {name for one in found for name in one.names}
        self.left_over = [name for name in stored.tensors if name not in used]
        self._order = {name: index for index, name in enumerate(stored.tensors)}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def sources(self, name: str) -> tuple[str, ...]:
        """Names of the stored tensors that a parameter is made of."""
        return self._conversions[name].names

    def parts(self, name: str) -> dict[str, Part] | None:
        """The stored tensors that make a parameter, each with the part of it that it is.

        `None` if they are more than put together, or if something else comes of them too.
        """
        one = self._conversions[name]
        if one.transform is None:
            return {one.names[0]: ()}
        if (stacks := _stacks(one)) is None:
            return None
        found: dict[str, Part] = {}
        above = 0
        for names in stacks:
            height = self.stored.tensors[names[0]].shape[0]
            rows = slice(above, above + height)
            found |= {expert: (index, rows) for index, expert in enumerate(names)}
            above += height
        return found

    def dtypes(self, name: str) -> set[str]:
        """Of the stored tensors, in safetensors' words."""
        return {self.stored.tensors[source].dtype for source in self.sources(name)}

    def place(self, name: str) -> int:
        """Where in the files a parameter begins: those read in this order need one file at once."""
        return self._order[self.sources(name)[0]]

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter, on the CPU."""
        one = self._conversions[name]
        if one.transform is None:
            return self.stored.read(one.names[0])
        if _stacks(one) is not None:  # nothing else comes of these tensors
            return one.convert(self._model, self.stored.read)[one.first]
        if self._converted is None or self._converted[0] is not one:
            self._converted = None  # never two at a time
            self._converted = one, one.convert(self._model, self.stored.read)
        return self._converted[1][self._called.get(name, name)]

    def reader(self, name: str) -> Callable[[Slices], torch.Tensor]:
        """Reads parts of a parameter."""
        one = self._conversions[name]
        if one.transform is None:
            return self.stored.reader(one.names[0])
        if (stacks := _stacks(one)) is not None:
            return lambda part: self._part_of_stacks(stacks, part)
        return self.read(name).__getitem__

    def is_read_in_parts(self, name: str) -> bool:
        """Whether `reader` reads no more than it is asked for; several threads may have one each.

        A parameter without dimensions has no parts.
        """
        one = self._conversions[name]
        return bool(self.shapes[name]) and (one.transform is None or _stacks(one) is not None)

    def first_values(self, name: str, count: int) -> torch.Tensor:
        """The first `count` values of a parameter, flat."""
        shape = self.shapes[name]
        if not shape:
            return self.read(name).flatten()
        needed, part = count, []
        for index, size in enumerate(shape):  # as few as fill it up, from the outside in
            inner = max(1, prod(shape[index + 1 :]))
            part.append(slice(0, min(size, -(-needed // inner))))
            if part[-1].stop > 1:
                part += [slice(0, size) for size in shape[index + 1 :]]
                break
        return self.reader(name)(tuple(part)).flatten()[:count]

    def fingerprint(self) -> BaseFingerprint:
        """What `fingerprint_base` would give of the loaded base."""
        digests = {
            name: sample_digest(self.shapes[name], self.reader(name))
            for name, _ in sorted(
                (pair for pair in base_parameters(self._model) if pair[0] in self),
                key=lambda pair: self.place(pair[0]),
            )
            if self.dtypes(name) <= PLAIN_DTYPES.keys()
        }
        self._converted = None
        config = comparable_config(self._model.config.to_dict())
        return BaseFingerprint(type(self._model).__name__, config, digests)

    def _part_of_stacks(self, stacks: list[list[str]], part: Slices) -> torch.Tensor:
        """Of experts' matrices, those of each one below the other: [experts, rows, columns]."""
        heights = [self.stored.tensors[names[0]].shape[0] for names in stacks]
        columns = part[2:]
        begin, end, _ = part[1].indices(sum(heights))
        experts = []
        for index in range(*part[0].indices(len(stacks[0]))):
            pieces, above = [], 0
            for names, height in zip(stacks, heights, strict=True):
                rows = slice(max(begin - above, 0), min(end - above, height))
                if rows.start < rows.stop:
                    pieces.append(self.stored.reader(names[index])((rows, *columns)))
                above += height
            experts.append(torch.cat(pieces))
        return torch.stack(experts)


def _shapes(
    one: Conversion, model: PreTrainedModel, stored: BaseWeights
) -> dict[str, tuple[int, ...]]:
    """Of what comes of stored tensors, if they fit each other."""

    def empty(name: str) -> torch.Tensor:
        return torch.empty(stored.tensors[name].shape, device="meta")

    try:
        made = one.convert(model, empty)
    except CONVERSION_ERRORS:
        return {}
    return {name: tuple(value.shape) for name, value in made.items()}


def _stacks(one: Conversion) -> list[list[str]] | None:
    """The names of the experts' matrices, a list for each of an expert's, if that is all it is."""
    if not isinstance(one.transform, WeightConverter):
        return None
    kinds = [type(operation) for operation in one.transform.operations]
    dims = [operation.dim for operation in one.transform.operations if hasattr(operation, "dim")]
    if (kinds, dims) not in (
        ([MergeModulelist], [0]),
        ([MergeModulelist, Concatenate], [0, 1]),
    ):
        return None
    return [
        [name for name, own in one.sources if own == pattern]
        for pattern in one.transform.source_patterns
    ]
