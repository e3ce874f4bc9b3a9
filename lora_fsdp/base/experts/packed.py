"""Modules that hold the weights of all experts in one tensor each, kept packed.

Such a module computes in its own way (a loop over experts, one grouped matmul), and reads its
weights as attributes. Here the attribute gives the numbers and the parameter of that name stays
packed: names, shards and adapters are those of the module as it was.

The numbers of one layer are there at a time. A matmul keeps its weight for backward; what would be
kept of these numbers is noted instead, and they are made anew in backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

# A convolution's last side is short.
_SHORTEST_SIDE = 8


class PackedParameter(nn.Parameter):
    """The packed numbers of a stack of matrices."""


class Packing:
    """How one stack of matrices is packed.

    Attributes:
        shape: of the numbers [matrices, rows, columns].
        dtype: of the numbers, and of the packed tensor's elements.
    """

    shape: torch.Size
    dtype: torch.dtype

    def empty(self) -> PackedParameter:
        """The packed parameter without values, on the meta device."""
        raise NotImplementedError

    def quantize(
        self, read: Callable[[tuple[slice, ...]], torch.Tensor], *, device: torch.device
    ) -> torch.Tensor:
        """The packed form of what `read` gives part by part, on `device`; keeps the scales."""
        raise NotImplementedError

    @property
    def is_filled(self) -> bool:
        """Whether there are scales."""
        raise NotImplementedError

    def unpack(self, packed: torch.Tensor, only: Iterable[int] | None = None) -> torch.Tensor:
        """The numbers of the full packed tensor; with `only`, those of the other matrices are
        left as memory happens to be."""
        raise NotImplementedError


#: Gives the numbers of a stack with what an adapter adds to them.
_Addition = Callable[[torch.Tensor], torch.Tensor]


class PackedExperts(nn.Module):
    """What a module of experts becomes when parameters of it are packed (`pack_parameters`)."""

    packings: dict[str, Packing]
    additions: dict[str, _Addition]
    _use: _Use | None
    _only_shapes: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, with the numbers at hand."""
        use = _Use(weakref.ref(self), only=_used_experts(self, [*args, *kwargs.values()]))
        _keep_only(None)
        self._use = use
        try:
            with use.noted_for_backward():
                return super().forward(*args, **kwargs)
        finally:
            self._use = None
            use.made.clear()

    @contextmanager
    def as_shapes(self) -> Iterator[None]:
        """Within the block, the attributes have the numbers' shape and dtype, and no values."""
        before, self._only_shapes = self._only_shapes, True
        try:
            yield
        finally:
            self._only_shapes = before

    def numbers(self, name: str, only: Iterable[int] | None = None) -> torch.Tensor:
        """A packed parameter's numbers, without what an adapter adds."""
        packed, packing = cast(torch.Tensor, self._parameters[name]), self.packings[name]
        if self._only_shapes or packed.is_meta or not packing.is_filled:
            empty = torch.zeros((), dtype=packing.dtype, device=packed.device)
            return empty.expand(packing.shape)
        with torch.no_grad():
            return packing.unpack(packed.detach(), only)

    def _attribute(self, name: str) -> torch.Tensor:
        parameter = cast(torch.Tensor, self._parameters[name])
        if isinstance(parameter, DTensor) and not self._only_shapes:
            return parameter  # torch asks for its own shard; there are no numbers of one
        if self._use is None or self._only_shapes:
            return self.numbers(name)
        return self._use.numbers(name)


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters that are stacks of matrices, as those of experts are."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape[1:]) > _SHORTEST_SIDE
    }


def pack_parameters(module: nn.Module, packings: dict[str, Packing]) -> None:
    """Make `module` one whose parameters of these names are packed; they have no values yet."""
    for name, packing in packings.items():
        module._parameters[name] = packing.empty()
    module.__class__ = _packed_class(cast(Any, type(module)), tuple(packings))
    packed = cast(PackedExperts, module)
    packed.packings, packed.additions = packings, {}
    packed._use, packed._only_shapes = None, False


@cache
def _packed_class(original: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    # A property of the class goes before the parameter of the same name.
    attributes = {name: property(partial(PackedExperts._attribute, name=name)) for name in names}
    attributes["__module__"] = original.__module__  # type: ignore[assignment]
    return type(f"Packed{original.__name__}", (PackedExperts, original), attributes)


def plain_experts(experts: PackedExperts) -> nn.Module:
    """A copy with its numbers in ordinary parameters, on the meta device where it has none yet."""
    plain = deepcopy(experts)
    for name in experts.packings:
        numbers = experts.numbers(name)
        if cast(torch.Tensor, experts._parameters[name]).is_meta:
            numbers = torch.empty_like(numbers, device="meta")
        plain._parameters[name] = nn.Parameter(numbers, requires_grad=False)
    plain.__class__ = type(experts).__bases__[1]
    for own in ("packings", "additions", "_use", "_only_shapes"):
        del vars(plain)[own]
    return plain


# ---- LoRA on experts ----------------------------------------------------------------------------


def add_lora_to_numbers(model: nn.Module) -> None:
    """Let PEFT's adapters of packed parameters add to the numbers, where these are made.

    PEFT itself would register a parametrization on the module for each forward, and keep the sum
    of every layer until its backward. To be called whenever PEFT has attached an adapter.
    """
    for module in model.modules():
        if isinstance(module, ParamWrapper) and isinstance(module.get_base_layer(), PackedExperts):
            # Bound to the module and not to a name, so that a deep copy has its own.
            vars(module)["_activate_lora"] = partial(_adding, module)


@contextmanager
def _adding(wrapper: ParamWrapper, active_adapters: list[str]) -> Iterator[None]:
    experts = cast(PackedExperts, wrapper.get_base_layer())
    adapters = [name for name in active_adapters if name in wrapper.lora_A]
    if not adapters:
        yield
        return
    experts.additions[wrapper.parameter_name] = partial(_sum, wrapper, adapters)
    try:
        yield
    finally:
        experts.additions.pop(wrapper.parameter_name)


def _sum(wrapper: ParamWrapper, adapters: list[str], numbers: torch.Tensor) -> torch.Tensor:
    """What PEFT computes: in the numbers' dtype, whatever autocast says."""
    with (
        cast(PackedExperts, wrapper.get_base_layer()).as_shapes(),
        torch.autocast(numbers.device.type, enabled=False),
    ):
        if len(adapters) == 1 and wrapper.num_experts > 1:
            left, right, scaling = wrapper.get_delta_factors(adapters[0])
            return torch.baddbmm(numbers, left, right, alpha=scaling)
        delta: Any = sum(wrapper.get_delta_weight(name) for name in adapters)
        return cast(torch.Tensor, numbers + delta)


# ---- the numbers, while they are used -----------------------------------------------------------


@dataclass(eq=False)
class _Use:
    """One forward of a module of experts, and its backward.

    Attributes:
        experts: the module.
        only: the experts that are read, if that is known and fewer than all.
        made: the numbers that were made, by the parameter's name.
        additions: what was added to them.
    """

    experts: weakref.ref[PackedExperts]
    only: list[int] | None
    made: dict[str, torch.Tensor] = field(default_factory=dict)
    additions: dict[str, _Addition] = field(default_factory=dict)

    def numbers(self, name: str) -> torch.Tensor:
        """In forward: made where they are asked for the first time."""
        if name not in self.made:
            experts = cast(PackedExperts, self.experts())
            if name in experts.additions:
                self.additions[name] = experts.additions[name]
            self.made[name] = self._make(name)
        return self.made[name]

    def numbers_again(self, name: str) -> torch.Tensor:
        """In backward: those of one layer stay until another's are asked for."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self._make(name)  # what is made in a graph is there only while it runs
        _keep_only(self)
        if name not in self.made:
            self.made[name] = self._make(name)
        return self.made[name]

    def _make(self, name: str) -> torch.Tensor:
        numbers = cast(PackedExperts, self.experts()).numbers(name, self.only)
        return self.additions[name](numbers) if name in self.additions else numbers

    def noted_for_backward(self) -> Any:
        """A context in which no numbers are kept for backward.

        Where others' hooks are in force, activations are recomputed or moved, and so are these.
        """
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if hooked or not torch.is_grad_enabled():
            return nullcontext()
        return saved_tensors_hooks(self._note, _look_up)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor | _Noted:
        address = tensor.untyped_storage().data_ptr()
        for name, numbers in self.made.items():
            if numbers.untyped_storage().data_ptr() == address and numbers.dtype == tensor.dtype:
                place = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
                return _Noted(self, name, place)
        return tensor.detach()  # not the tensor itself, which may hold what keeps it


@dataclass(frozen=True)
class _Noted:
    """A view of numbers that are not kept: its shape, its strides and where it begins."""

    use: _Use
    name: str
    place: tuple[tuple[int, ...], tuple[int, ...], int]


def _look_up(noted: torch.Tensor | _Noted) -> torch.Tensor:
    if isinstance(noted, torch.Tensor):
        return noted
    with torch.no_grad():
        return noted.use.numbers_again(noted.name).as_strided(*noted.place)


#: The use whose numbers are there for backward.
_latest: list[_Use] = []


def _keep_only(use: _Use | None) -> None:
    for other in _latest:
        if other is not use:
            other.made.clear()
    _latest[:] = [] if use is None else [use]


def _used_experts(experts: PackedExperts, inputs: Iterable[Any]) -> list[int] | None:
    """The experts that the router chose, where they are few and nothing is kept for backward.

    So it is when text is generated: unpacking the others would take most of a token's time.
    """
    chosen = [one for one in inputs if isinstance(one, torch.Tensor) and one.dtype == torch.int64]
    stacks = min(packing.shape[0] for packing in experts.packings.values())
    if torch.is_grad_enabled() or len(chosen) != 1 or chosen[0].is_meta:
        return None
    if 2 * chosen[0].numel() > stacks:
        return None
    return sorted({index for index in chosen[0].flatten().tolist() if index < stacks})
