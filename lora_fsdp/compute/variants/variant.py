"""What `Projections` asks of a linear layer's adapter. A kind of LoRA is one file beside this."""

from __future__ import annotations

from abc import ABC, abstractmethod

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_fsdp.base.quantized_layers import QuantizedLayer


class LoraVariant(ABC):
    """An adapter that adds s B A drop(x) to a frozen linear layer's output.

    Args:
        module: PEFT's layer (see `fits`).

    Attributes:
        linear: the frozen layer.
        rank: r.
    """

    linear: nn.Linear | QuantizedLayer
    rank: int

    @abstractmethod
    def __init__(self, module: LoraLayer) -> None: ...

    @classmethod
    @abstractmethod
    def fits(cls, module: LoraLayer) -> bool:
        """Whether `module` is adapted in this way only."""

    @abstractmethod
    def is_as_made(self) -> bool:
        """Whether the module's adapter is the one it had, and not merged."""

    @abstractmethod
    def is_on(self) -> bool:
        """Whether the adapter is to be added."""

    @abstractmethod
    def matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, in] and B [out, r], float32, as they are now."""

    @abstractmethod
    def scaling(self) -> float:
        """s."""

    @abstractmethod
    def dropout(self) -> float:
        """Share of the adapter's input that is dropped; 0 when not training."""


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer and nothing more."""
    return type(module) is nn.Linear or isinstance(module, QuantizedLayer)
