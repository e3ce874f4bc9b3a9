"""What a LoRA adapter adds to each weight of its base, one weight at a time."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from lora_fsdp.adapter.folder import AdapterFolder, load_on_skeleton
from lora_fsdp.base.stored_weights import BaseWeights, StoredTensor, stored_names
from lora_fsdp.base.tensor_files import DTYPES
from lora_fsdp.errors import (
    AdapterVerificationError,
    BaseMismatchError,
    MergeError,
    UnsupportedAdapterError,
)


class Deltas:
    """What the adapter adds to each weight of the base, computed by PEFT when it is asked for."""

    def __init__(
        self,
        adapter: AdapterFolder,
        skeleton: PreTrainedModel,
        weights: BaseWeights,
        *,
        base: str,
    ) -> None:
        """Find for every adapted module the tensor that it changes.

        Raises:
            BaseMismatchError: the adapter's shapes do not fit this base.
            UnsupportedAdapterError: it adapts something else than linear layers.
            MergeError: the base stores a weight under another name.
        """
        self._adapter = adapter
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        names = stored_names(skeleton, weights.tensors)
        tied = _tied_weights(skeleton)
        try:
            model = load_on_skeleton(adapter, skeleton)
        except AdapterVerificationError as error:
            raise BaseMismatchError(
                f"The adapter {adapter.path} does not fit the base {base}: {error}"
            ) from error
        self._layers: dict[str, tuple[str, LoraLayer]] = {}
        for path, module in cast(nn.Module, model.base_model.model).named_modules():
            if not isinstance(module, LoraLayer):
                continue
            weight = f"{path}.weight"
            if "default" not in module.lora_A or weight in tied:
                raise UnsupportedAdapterError(
                    f"{adapter.path} adapts {path}, an embedding or a weight that is tied to "
                    "another: merging would change both. Use it as an adapter."
                )
            stored = names.get(weight, "")
            _check_stored(weight, weights.tensors.get(stored), shapes[weight], base=base)
            self._layers[stored] = (path, module)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, stored: str) -> bool:
        return stored in self._layers

    def __getitem__(self, stored: str) -> torch.Tensor:
        """What is added to the tensor that the base stores as `stored`, float32."""
        path, module = self._layers[stored]
        prefix = f"base_model.model.{path}"
        for kind in ("lora_A", "lora_B"):
            name = f"{prefix}.{kind}.weight"
            if name not in self._adapter.tensors:
                raise MergeError(
                    f"{self._adapter.path} stores {path} under another name: load it once with "
                    "PEFT and save it again."
                )
            tensor = self._adapter.tensors[name].float()
            getattr(module, kind)["default"].weight = nn.Parameter(tensor, requires_grad=False)
        try:
            return cast(Any, module).get_delta_weight("default").detach()
        finally:
            for kind in ("lora_A", "lora_B"):
                getattr(module, kind)["default"].weight = nn.Parameter(
                    torch.empty(0, device="meta"), requires_grad=False
                )


def _check_stored(
    weight: str, stored: StoredTensor | None, shape: tuple[int, ...], *, base: str
) -> None:
    if stored is None or stored.shape != shape:
        raise MergeError(
            f"{base} does not store {weight} as the model has it: load it once with "
            "transformers, save it with save_pretrained, and merge onto that folder."
        )
    if not DTYPES.get(stored.dtype, torch.uint8).is_floating_point:
        raise MergeError(f"{base} stores {weight} quantised: merge onto the original model.")


def _tied_weights(skeleton: PreTrainedModel) -> set[str]:
    """Names of the parameters that are one and the same under several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for shared in names.values() if len(shared) > 1 for name in shared}
