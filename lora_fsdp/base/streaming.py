"""A base that is still in its files: its model without weights, filled tensor by tensor.

`from_pretrained` puts a whole model into host memory before anything is sharded, on every rank.
Here the model is built on the meta device, the adapter attached, the base sharded, and only then
does each rank read its shard of each tensor, straight to where it stays, with several threads. No
rank ever holds more than that, one layer, and a few pieces of 16 MB. So each byte of what is
sharded is read by one rank of those that share it; of what every rank keeps, the page cache serves
all but the first.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.conversion.model_weights import ModelWeights
from lora_fsdp.base.experts.packed import PackedExperts, PackedParameter
from lora_fsdp.base.fingerprints import BaseFingerprint, base_parameters
from lora_fsdp.base.loading import load_base, resolve_dtype
from lora_fsdp.base.multimodal import drop_towers
from lora_fsdp.base.quantized_layers import QuantizedLayer, unpacked
from lora_fsdp.base.reading.pieces import Piece, pieces_of, read_pieces
from lora_fsdp.base.skeletons import CannotStreamError, empty_base
from lora_fsdp.base.stored_weights import base_folder, base_skeleton
from lora_fsdp.errors import MissingPackageError, UnsupportedModelError
from lora_fsdp.ranks import rank, ranks_on_host

logger = logging.getLogger(__name__)


#: Modules that hold a parameter, and its name there: several, if it is shared.
_Places = list[tuple[nn.Module, str]]


@dataclass(frozen=True)
class StoredBase:
    """A base whose weights have not been read yet.

    Attributes:
        model: the model, its parameters on the meta device, its buffers real.
        weights: what its files hold, by the model's names.
    """

    model: PreTrainedModel
    weights: ModelWeights

    def fingerprint(self) -> BaseFingerprint:
        """What `fingerprint_base` would give of the loaded base, before it was quantised."""
        return self.weights.fingerprint()

    def first_values(self, count: int) -> Iterator[list[float]]:
        """The first `count` values of every parameter, in the base's dtype and not quantised."""
        for name, _ in base_parameters(self.model):
            values = self.weights.first_values(name, count)
            yield values.to(self.model.dtype).float().tolist()

    @contextmanager
    def stand_ins(self) -> Iterator[None]:
        """Within the block, the parameters are on the CPU and take no memory.

        PEFT makes an adapter where the base's weights are, and on the meta device an adapter would
        lose its first values. They must not be read or written.
        """
        originals: dict[int, nn.Parameter] = {}
        made = []  # kept, so that no other parameter gets an id of theirs
        for places in _empty_places([self.model]):
            parameter = _parameter_at(places)
            made.append(_stand_in(parameter))
            originals[id(made[-1])] = parameter
            _set(places, made[-1])
        yield
        for places in _places(self.model):
            original = originals.get(id(_parameter_at(places)))
            if original is not None:
                _set(places, original)

    def fill(
        self, modules: Iterable[nn.Module], *, device: torch.device, keep_on: torch.device
    ) -> None:
        """Read what of `modules` is still on the meta device; of a sharded one, this rank's shard.

        Args:
            modules: modules of the model.
            device: where the run computes.
            keep_on: where the weights stay (host memory, if they are offloaded).
        """
        names = self._names_by_id()
        found = [(names[id(_parameter_at(places))], places) for places in _empty_places(modules)]
        copied: list[tuple[_Places, torch.Tensor]] = []
        pieces: list[Piece] = []
        # In the files' order, of which one is open at a time.
        for name, places in sorted(found, key=lambda pair: self.weights.place(pair[0])):
            if _is_packed(places) or not self.weights.is_read_in_parts(name):
                self._fill_one(places, name, device=device, keep_on=keep_on)
                continue
            filled = _empty_like(_parameter_at(places), device=keep_on)
            pieces += self._pieces(filled, name)
            copied.append((places, filled))
        read_pieces(pieces, ranks_here=ranks_on_host())
        for places, filled in copied:
            _set(places, nn.Parameter(filled, requires_grad=False))

    def _pieces(self, filled: torch.Tensor, name: str) -> Iterator[Piece]:
        """What of a parameter, or of this rank's shard of it, is to be read."""
        target, own = _own_part(filled)
        return pieces_of(target, own, partial(self.weights.reader, name)) if own else iter(())

    def filled_copy(self, layer: nn.Module) -> nn.Module:
        """A copy of a layer of the model with its weights, unpacked and in host memory."""
        names = self._names_by_id()
        copied, host = deepcopy(unpacked(layer)), torch.device("cpu")
        for original, places in zip(layer.parameters(), _places(copied), strict=True):
            if original.is_meta:
                self._fill_one(places, names[id(original)], device=host, keep_on=host)
        return copied

    def _names_by_id(self) -> dict[int, str]:
        """What each parameter, as it is now, was called before there was an adapter."""
        return {id(value): name for name, value in base_parameters(self.model)}

    def _fill_one(
        self, places: _Places, name: str, *, device: torch.device, keep_on: torch.device
    ) -> None:
        parameter = _parameter_at(places)
        owner, attribute = places[0]
        if isinstance(owner, PackedExperts) and attribute in owner.packings:
            packed = owner.packings[attribute].quantize(self.weights.reader(name), device=device)
            if not isinstance(parameter, DTensor):
                _set(places, PackedParameter(packed.to(keep_on), requires_grad=False))
                return
            filled = _empty_like(parameter, device=keep_on)
            _copy_shard(filled, packed.__getitem__)
        elif isinstance(owner, QuantizedLayer) and attribute == "weight":
            # The full tensor: the scales are relative to their mean over all of it.
            packed = owner.quantize(self._read_whole(name, device=device))
            if not isinstance(parameter, DTensor):
                owner.set_whole(packed.to(keep_on))
                return
            filled = _empty_like(parameter, device=keep_on)
            _copy_shard(filled, packed.__getitem__)
        else:
            filled = _empty_like(parameter, device=keep_on)
            if isinstance(filled, DTensor):
                _copy_shard(filled, self.weights.reader(name))
            else:
                filled.copy_(self.weights.read(name))
        _set(places, nn.Parameter(filled, requires_grad=False))

    def _read_whole(self, name: str, *, device: torch.device) -> torch.Tensor:
        """A full parameter in the dtype that its files have, on `device`."""
        if device.type == "cpu" or not self.weights.is_read_in_parts(name):
            return self.weights.read(name).to(device)
        shape = self.weights.shapes[name]
        nothing = self.weights.reader(name)(tuple(slice(0, 0) for _ in shape))
        whole = torch.empty(shape, dtype=nothing.dtype, device=device)
        read_pieces([*self._pieces(whole, name)], ranks_here=ranks_on_host())
        return whole


@dataclass(frozen=True)
class WholeBase:
    """A base that transformers must load whole, and has not loaded yet.

    Attributes:
        arguments: which base, and how.
        device: where the run computes.
        reason: why it cannot be read tensor by tensor.
        adapter: the settings of the adapter that will be attached, if they are known.
    """

    arguments: ModelArguments
    device: torch.device
    reason: str
    adapter: LoraConfig | None = None

    def skeleton(self) -> PreTrainedModel:
        """The model without numbers, on the meta device.

        Raises:
            ModelNotFoundError, UnsupportedModelError: it cannot be built from its config.
        """
        name, revision = self.arguments.model_name_or_path, self.arguments.model_revision
        folder = base_folder(name, revision=revision, with_weights=False)
        model = base_skeleton(folder, trust_remote_code=self.arguments.trust_remote_code)
        drop_towers(model, adapter=self.adapter, say=False)
        return model

    def load(self) -> PreTrainedModel:
        """The model, in host memory.

        Raises:
            ModelNotFoundError: there is no such model, or its weights are damaged or incomplete.
            UnsupportedModelError: it is not a causal language model, or cannot run as asked.
        """
        loaded = load_base(self.arguments, device=self.device)
        drop_towers(loaded, adapter=self.adapter, say=False)
        if rank() == 0:
            logger.warning(
                "Every process held the whole base in host memory while it was loaded, because %s.",
                self.reason,
            )
        return loaded


#: A base that has been read, or has not.
OpenBase = PreTrainedModel | StoredBase | WholeBase


def model_of(base: OpenBase) -> PreTrainedModel:
    """Its model, whose weights need not be there.

    Raises:
        ModelNotFoundError, UnsupportedModelError: as `WholeBase.skeleton`.
    """
    if isinstance(base, StoredBase):
        return base.model
    return base.skeleton() if isinstance(base, WholeBase) else base


def open_base(
    arguments: ModelArguments,
    *,
    device: torch.device,
    peft_config: LoraConfig | None = None,
    saved: LoraConfig | None = None,
) -> StoredBase | WholeBase:
    """The frozen base, of which nothing is read before it is known what this rank keeps.

    Where it cannot be read tensor by tensor (the weights are pickles, or not in the form that the
    model has them in; the adapter's first values depend on them), transformers loads it whole into
    host memory then, and a line in the log says why.

    Args:
        arguments: which base, and how.
        device: where the run computes.
        peft_config: of the adapter that will be attached.
        saved: of an adapter that will be loaded once the base has its weights.

    Raises:
        ModelNotFoundError: there is no such model.
        UnsupportedModelError: it cannot run as asked.
        MissingPackageError: 4 bits were asked for, and bitsandbytes is not installed.
    """
    if arguments.load_in_4bit:
        check_bitsandbytes()
    try:
        if peft_config is not None and (reason := needs_weights(peft_config)):
            raise CannotStreamError(reason)
        dtype = resolve_dtype(arguments.dtype, device=device)
        model, weights = empty_base(arguments, dtype=dtype, adapter=peft_config or saved)
    except CannotStreamError as error:
        if arguments.load_in_4bit:
            raise UnsupportedModelError(
                f"{arguments.model_name_or_path} cannot be turned into 4 bits while it is read: "
                f"{error}. Run without --load_in_4bit."
            ) from error
        return WholeBase(arguments, device, str(error), peft_config or saved)
    if arguments.load_in_4bit:
        from lora_fsdp.base.experts.four_bit import pack_experts
        from lora_fsdp.base.four_bit import replace_linear_layers

        replace_linear_layers(model, dtype=dtype)
        pack_experts(model, dtype=dtype)
    return StoredBase(model, weights)


def load_on_device(
    arguments: ModelArguments, *, device: torch.device, adapter: LoraConfig | None = None
) -> PreTrainedModel:
    """The frozen base, whole on `device`; see `open_base`.

    Args:
        arguments: which base, and how.
        device: where to.
        adapter: the settings of the saved adapter that will be loaded onto it, if there is one.
    """
    base = open_base(arguments, device=device, saved=adapter)
    if isinstance(base, WholeBase):
        return base.load().to(device)  # type: ignore[arg-type]
    base.fill([base.model], device=device, keep_on=device)
    return base.model.to(device)  # type: ignore[arg-type]


def check_bitsandbytes() -> None:
    """Check that the package for 4 bits is there.

    Raises:
        MissingPackageError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            "--load_in_4bit needs the package bitsandbytes, which is not installed: "
            'pip install "lora-fsdp[4bit]".'
        )


def needs_weights(config: LoraConfig) -> str | None:
    """Why an adapter of these settings cannot be attached before the base has its weights."""
    if config.init_lora_weights not in (True, False, "gaussian"):
        return f"init_lora_weights {config.init_lora_weights!r} computes with the base's weights"
    settings = {
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
        "bias": config.bias != "none",
    }
    used = [name for name, value in settings.items() if value]
    return f"{used[0]} copies or changes the base's weights" if used else None


# ---- parameters and where they are --------------------------------------------------------------


def _places(module: nn.Module) -> list[_Places]:
    """For each parameter where it is, in the order of `module.parameters()`."""
    found: dict[int, _Places] = {}
    for owner in module.modules():
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((owner, attribute))
    return list(found.values())


def _empty_places(modules: Iterable[nn.Module]) -> list[_Places]:
    """As `_places`, of several modules, for the parameters that have no values yet."""
    everywhere = [places for module in modules for places in _places(module)]
    return [places for places in everywhere if _parameter_at(places).is_meta]


def _parameter_at(places: _Places) -> nn.Parameter:
    owner, attribute = places[0]
    return cast(nn.Parameter, owner._parameters[attribute])  # not what packed experts make of it


def _set(places: _Places, parameter: nn.Parameter) -> None:
    for owner, attribute in places:
        owner._parameters[attribute] = parameter


def _stand_in(meta: nn.Parameter) -> nn.Parameter:
    """A parameter of one number, seen from everywhere in the shape of `meta`."""
    zeros = torch.zeros((), dtype=meta.dtype).expand(meta.shape)
    stand_in = type(meta)(zeros, requires_grad=False)
    vars(stand_in).update(vars(meta))  # what PEFT asks a quantised one
    return stand_in


def _empty_like(parameter: nn.Parameter, *, device: torch.device) -> torch.Tensor:
    return torch.empty_like(parameter, device=device, requires_grad=False)


def _is_packed(places: _Places) -> bool:
    """Whether a parameter is packed while it is read, and not copied."""
    owner, attribute = places[0]
    if isinstance(owner, PackedExperts):
        return attribute in owner.packings
    return isinstance(owner, QuantizedLayer) and attribute == "weight"


def _own_part(filled: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """This rank's memory of a tensor, and which slices of the full one it holds; none if empty."""
    if not isinstance(filled, DTensor):
        return filled, tuple(slice(0, side) for side in filled.shape)
    shape, start = compute_local_shape_and_global_offset(
        filled.shape, filled.device_mesh, filled.placements
    )
    if not all(shape):  # a rank's shard may be empty
        return filled.to_local(), ()
    own = tuple(slice(first, first + n) for first, n in zip(start, shape, strict=True))
    return filled.to_local(), own


def _copy_shard(shard: torch.Tensor, read: Callable[[tuple[slice, ...]], torch.Tensor]) -> None:
    """Fill this rank's shard with its slices of the full tensor, which `read` gives."""
    target, own = _own_part(shard)
    if own:
        target.copy_(read(own))
