"""The frozen base of several adapters: read once, and handed from one to the next."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import cast

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.multimodal import is_multimodal
from lora_fsdp.base.streaming import OpenBase, StoredBase, model_of, needs_weights, open_base
from lora_fsdp.training.together.loop import AdaptersTogether
from lora_fsdp.training.trainer import LoraTrainer


class KeptBase:
    """Opens the base when it is first taken; afterwards gives what the last adapter gave back.

    A base is kept where every rank holds it whole. One in shards, or with recomputed activations,
    is opened anew, and so is one that an adapter has changed (PiSSA, biases).

    Args:
        arguments: which base.
        device: where the run computes.

    Attributes:
        opened: how often it was opened so far.
    """

    def __init__(self, arguments: ModelArguments, *, device: torch.device) -> None:
        self.arguments, self.device, self.opened = arguments, device, 0
        self._base: OpenBase | None = None
        self._adapter: LoraConfig | None = None

    def look(self, adapter: LoraConfig) -> PreTrainedModel:
        """The model, perhaps without its weights; the next `take` gets the same base."""
        self._base, self._adapter = self.take(adapter), adapter
        return model_of(self._base)

    def take(self, adapter: LoraConfig) -> OpenBase:
        """The base without any adapter, for one of these settings.

        Raises:
            ModelNotFoundError, UnsupportedModelError, MissingPackageError: as `open_base`.
        """
        kept, self._base = self._base, None
        if kept is not None and self._suits(kept, adapter):
            return kept
        del kept  # before another takes its place in memory
        _free()
        self.opened, self._adapter = self.opened + 1, adapter
        return open_base(self.arguments, device=self.device, peft_config=adapter)

    def _suits(self, base: OpenBase, adapter: LoraConfig) -> bool:
        before = self._adapter
        if before is adapter:  # it was opened for it
            return True
        if before is None or needs_weights(adapter) is not None:
            return False
        # Which parts of it were left out follows from the targets.
        same = _targets(before) == _targets(adapter)
        return same or not is_multimodal(model_of(base))

    def give_back(self, user: LoraTrainer | AdaptersTogether, base: OpenBase) -> None:
        """Take a base that was given by `take` out of its trained adapters, if it can be kept.

        Args:
            user: which trained with it, and is of no further use.
            base: what `take` gave.
        """
        configs = cast(Mapping[str, LoraConfig], user.model.peft_config).values()
        layout = user.placement.layout
        unchanged = all(needs_weights(one) is None for one in configs)
        if not (user.placement.is_whole and unchanged) or layout.recomputed:
            return
        user.packed.undo()
        model = user.model.unload()
        model.eval()
        # What its files hold is still asked of the stored base: fingerprints, first values.
        self._base = base if isinstance(base, StoredBase) else model


def _targets(config: LoraConfig) -> tuple[object, ...]:
    return config.target_modules, config.target_parameters, config.modules_to_save


def _free() -> None:
    """Trainers hold their model in circles, which only the collector of circles finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
