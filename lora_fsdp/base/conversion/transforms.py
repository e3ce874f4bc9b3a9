"""What transformers makes of the tensors in a model's files: their names and shapes in the model.

Files keep the names and the layout in which a model was published, such as a matrix for each
expert; the model may have other ones. transformers knows how the one becomes the other
(`transformers.conversion_mapping`), and is asked here for each tensor without reading any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that become parameters (or buffers) of the model together.

    Attributes:
        sources: the stored tensors' names, each with the pattern of the transform that it matches,
            in the order in which transformers takes them.
        transform: how they are converted; `None` = the one tensor as it is.
        first: the first of the model's names for what comes of it.
    """

    sources: tuple[tuple[str, str], ...]
    transform: WeightConverter | None
    first: str

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors' names."""
        return tuple(name for name, _ in self.sources)

    def convert(
        self, model: PreTrainedModel, read: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What comes of the stored tensors, by its name in the model.

        Args:
            model: whose tensors they are.
            read: gives a stored tensor; may be on the meta device, and so is the result then.

        Raises:
            RuntimeError, ValueError, ...: the tensors do not fit each other.
        """
        if self.transform is None:
            return {self.first: read(self.sources[0][0])}
        transform = copy.deepcopy(self.transform)
        for name, pattern in self.sources:
            transform.add_tensor(self.first, name, pattern, read(name))  # type: ignore[arg-type]
        made = transform.convert(self.first, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


def conversions(model: PreTrainedModel, stored: Iterable[str]) -> list[Conversion]:
    """What transformers would do with stored tensors of these names; others belong to no part.

    Args:
        model: perhaps without weights.
        stored: names of tensors in the files.
    """
    known = set(model.state_dict())
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: dict[str, list[tuple[str, str]]] = {}
    used: dict[str, WeightConverter | None] = {}
    # As `transformers.core_model_loading.convert_and_load_state_dict_in_model` goes about it.
    lookup = dict.fromkeys(known, True)
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, lookup
        )
        if target not in known and name in known:
            target, pattern = rename_source_key(
                name, [], [], base_model_prefix=model.base_model_prefix, meta_state_dict=lookup
            )
        if target in known:
            found.setdefault(target, []).append((name, pattern or name))
            used.setdefault(target, by_pattern[pattern] if pattern is not None else None)
    return [Conversion(tuple(found[target]), used[target], target) for target in found]
