"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732), which scales otherwise, with dropout."""

from __future__ import annotations

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_fsdp.base.quantized_layers import QuantizedLayer
from lora_fsdp.compute.variants.variant import LoraVariant, is_linear

# PEFT's, around a plain linear layer and around a packed one (which it can import with bitsandbytes
# only).
_CLASSES = ("Linear", "Linear4bit")


class PlainLora(LoraVariant):
    """One adapter, without biases or anything else between A and B."""

    def __init__(self, module: LoraLayer) -> None:
        self._module = module
        self._name = str(module.active_adapters[0])
        self.linear: nn.Linear | QuantizedLayer = module.base_layer  # type: ignore[assignment]
        self.rank = int(module.r[self._name])

    @classmethod
    def fits(cls, module: LoraLayer) -> bool:
        """Whether `module` has plain LoRA around a frozen linear layer."""
        names = module.active_adapters
        return (
            type(module).__name__ in _CLASSES
            and is_linear(module.base_layer)
            and len(names) == 1
            and list(module.lora_A) == names  # one adapter, and it is the active one
            and not module.merged
            and not module.fan_in_fan_out  # type: ignore[attr-defined]
            and not module.lora_variant
            and module.lora_A[names[0]].bias is None
            and module.lora_B[names[0]].bias is None
            and type(module.lora_dropout[names[0]]) in (nn.Dropout, nn.Identity)
            and not any(p.requires_grad for p in module.base_layer.parameters())
        )

    def is_as_made(self) -> bool:
        return list(self._module.active_adapters) == [self._name] and not self._module.merged

    def is_on(self) -> bool:
        return not self._module.disable_adapters

    def matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        a, b = self._module.lora_A[self._name], self._module.lora_B[self._name]
        return a.weight, b.weight  # type: ignore[return-value]

    def scaling(self) -> float:
        return float(self._module.scaling[self._name])

    def dropout(self) -> float:
        dropout = self._module.lora_dropout[self._name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
