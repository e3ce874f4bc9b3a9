"""What a LoRA adapter adds to each weight of its base, one weight at a time."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from lora_fsdp.adapter.folder import AdapterFolder, load_on_skeleton
from lora_fsdp.base.conversion.model_weights import ModelWeights, Part
from lora_fsdp.base.tensor_files import DTYPES
from lora_fsdp.errors import (
    AdapterVerificationError,
    BaseMismatchError,
    MergeError,
    UnsupportedAdapterError,
)


class Deltas:
    """What the adapter adds to each tensor of the base's files, computed by PEFT when asked for."""

    def __init__(
        self, adapter: AdapterFolder, skeleton: PreTrainedModel, weights: ModelWeights, *, base: str
    ) -> None:
        """Find for every adapted weight the stored tensors that it changes.

        Raises:
            BaseMismatchError: the adapter's shapes do not fit this base.
            UnsupportedAdapterError: it adapts something else than linear layers and experts.
            MergeError: the base stores a weight otherwise than the model has it.
        """
        self._adapter = adapter
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        tied = _tied_weights(skeleton)
        try:
            model = load_on_skeleton(adapter, skeleton)
        except AdapterVerificationError as error:
            raise BaseMismatchError(
                f"The adapter {adapter.path} does not fit the base {base}: {error}"
            ) from error
        # For each stored tensor the module that changes it, and which part of the module's weight
        # it is.
        self._changed: dict[str, tuple[str, LoraLayer, Part]] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        for path, module in cast(nn.Module, model.base_model.model).named_modules():
            if not isinstance(module, LoraLayer):
                continue
            weight = _adapted_weight(path, module)
            if "default" not in module.lora_A or weight in tied:
                raise UnsupportedAdapterError(
                    f"{adapter.path} adapts {path}, an embedding or a weight that is tied to "
                    "another: merging would change both. Use it as an adapter."
                )
            parts = _stored_parts(weight, weights, shapes[weight], base=base)
            self._changed |= {name: (path, module, part) for name, part in parts.items()}

    def __len__(self) -> int:
        """How many weights of the model are changed."""
        return len({path for path, _, _ in self._changed.values()})

    def __contains__(self, stored: str) -> bool:
        return stored in self._changed

    def __getitem__(self, stored: str) -> torch.Tensor:
        """What is added to the tensor that the base stores as `stored`, float32."""
        path, module, part = self._changed[stored]
        if self._last is None or self._last[0] != path:  # one expert after the other asks for it
            self._last = None
            self._last = path, self._of_module(path, module)
        return self._last[1][part]

    def _of_module(self, path: str, module: LoraLayer) -> torch.Tensor:
        """What is added to a whole weight of the model."""
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
        if isinstance(module, ParamWrapper):
            # PEFT gives the result where the parameter is, and in its dtype.
            place = torch.zeros(()).expand(module.get_param().shape)
            module.get_base_layer().register_parameter(
                module.parameter_name, nn.Parameter(place, False)
            )
        try:
            return cast(Any, module).get_delta_weight("default").detach()
        finally:
            for kind in ("lora_A", "lora_B"):
                getattr(module, kind)["default"].weight = nn.Parameter(
                    torch.empty(0, device="meta"), requires_grad=False
                )


def _adapted_weight(path: str, module: LoraLayer) -> str:
    """The base's name for the weight that a module of PEFT's changes."""
    owner = re.sub(r"\.base_layer(?=\.|$)", "", path)
    return f"{owner}.{module.parameter_name if isinstance(module, ParamWrapper) else 'weight'}"


def _stored_parts(
    weight: str, weights: ModelWeights, shape: tuple[int, ...], *, base: str
) -> dict[str, Part]:
    """The stored tensors that a weight is made of, and which part of it each is."""
    parts = weights.parts(weight) if weights.shapes.get(weight) == shape else None
    if parts is None:
        raise MergeError(
            f"{base} does not store {weight} as the model has it: load it once with "
            "transformers, save it with save_pretrained, and merge onto that folder."
        )
    dtypes = (DTYPES.get(dtype, torch.uint8) for dtype in weights.dtypes(weight))
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise MergeError(f"{base} stores {weight} quantised: merge onto the original model.")
    return parts


def _tied_weights(skeleton: PreTrainedModel) -> set[str]:
    """Names of the parameters that are one and the same under several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for shared in names.values() if len(shared) > 1 for name in shared}
