"""The adapters of a run, whole on every rank: gradients summed in one block, checked to stay equal.

Each adapter has its own parameters and its own part of the block of gradients; what concerns all of
them (the ranks' sum, steps that are not finite) is done once, on the block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn

from lora_fsdp.adapter.ownership import parameters_by_adapter
from lora_fsdp.errors import AdapterVerificationError
from lora_fsdp.ranks import check_ranks_agree, sum_over_ranks, take_from_first


class Adapter:
    """One adapter of a run.

    Args:
        parameters: by name, float32.
        gradients: the adapter's part of the set's block, flat, in the parameters' order.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], gradients: torch.Tensor) -> None:
        self.parameters = dict(parameters)
        self.gradients = gradients
        pieces = gradients.split([value.numel() for value in self.parameters.values()])
        self._views = [
            (value, piece.view_as(value))
            for value, piece in zip(self.parameters.values(), pieces, strict=True)
        ]

    def attach_gradients(self) -> None:
        """Have backward add to the block."""
        for value, gradient in self._views:
            value.grad = gradient

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm of the adapter's gradients, on the device."""
        return torch.linalg.vector_norm(self.gradients)

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, on the one block; the norm before clipping."""
        norm = self.gradient_norm()
        self.gradients.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm


class AdapterSet:
    """The adapters of a run by name, with one block of gradients.

    Args:
        parameters: of each adapter, by its name and their own; the same on every rank, float32.

    Attributes:
        adapters: by name.
        parameters: of all adapters, by name.
        gradients: of all adapters, flat; an adapter's are a slice of it.
    """

    def __init__(self, parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        self.parameters = {name: p for own in parameters.values() for name, p in own.items()}
        values = self.parameters.values()
        self.gradients = torch.cat([torch.zeros_like(value).flatten() for value in values])
        sizes = [sum(value.numel() for value in own.values()) for own in parameters.values()]
        self.adapters: Mapping[str, Adapter] = {
            name: Adapter(own, part)
            for (name, own), part in zip(
                parameters.items(), self.gradients.split(sizes), strict=True
            )
        }
        self._b_at_start = self._lora_b_sums()

    @classmethod
    def of(cls, model: PeftModel) -> AdapterSet:
        """The adapters of `model` that are trained.

        Raises:
            ArgumentError: what is trainable is not the whole of some adapters.
        """
        return cls(parameters_by_adapter(model))

    # ---- gradients ------------------------------------------------------------------------------

    def zero_gradients(self) -> None:
        """Set every gradient to zero, in one block of memory that stays where it is.

        A captured step needs fixed addresses, and the ranks' sum needs no copy.
        """
        self.gradients.zero_()
        for adapter in self.adapters.values():
            adapter.attach_gradients()

    def drop_gradients(self, set_to_none: bool = True) -> None:
        """As `nn.Module.zero_grad`, without walking through the frozen base."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def copy_gradients(self) -> torch.Tensor:
        """All gradients, flat."""
        return self.gradients.clone()

    def set_gradients(self, gradients: torch.Tensor) -> None:
        """Put back what `copy_gradients` gave."""
        self.gradients.copy_(gradients)

    def sum_gradients(self) -> None:
        """Sum the gradients over all ranks: one flat float32 all-reduce for all adapters.

        The sum is right, not the mean, because each rank's loss is already divided by the number
        of label tokens of all ranks. A parameter without a gradient counts as zero.
        """
        sum_over_ranks(self.gradients)

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm of all gradients, on the device."""
        return torch.linalg.vector_norm(self.gradients)

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Clip each adapter's gradients by their own norm; the norm of all before clipping."""
        norms = [adapter.clip_gradients(max_norm) for adapter in self.adapters.values()]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    # ---- weights --------------------------------------------------------------------------------

    def broadcast(self) -> None:
        """Give every rank rank 0's values."""
        for parameter in self.parameters.values():
            take_from_first(parameter.data)

    def check_equal(self) -> None:
        """Check that every rank holds the same bits.

        Raises:
            RankMismatchError: the adapters have drifted apart.
        """
        check_ranks_agree({"the adapter's weights (SHA-256)": self.fingerprint()})

    def check_moved(self) -> None:
        """Check on this rank that training has moved every `lora_B`, which starts at zero.

        Raises:
            AdapterVerificationError: names those that did not move.
        """
        now, before = self._lora_b_sums(), self._b_at_start
        still = [name for name, value in now.items() if value == before[name]]
        if still:
            raise AdapterVerificationError(
                f"{len(still)} of {len(before)} lora_B did not move in the first "
                f"optimizer step with a learning rate on this rank (for example {still[0]}): their "
                "gradients do not arrive."
            )

    def checksums(self) -> torch.Tensor:
        """The sum of every parameter's bits as integers, [parameters] int64, on the device."""
        return torch.stack(
            [
                parameter.detach().view(torch.int32).sum(dtype=torch.int64)
                for parameter in self.parameters.values()
            ]
        )

    def fingerprint(self) -> str:
        """SHA-256 of all values."""
        digest = hashlib.sha256()
        for name, parameter in self.parameters.items():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _lora_b_sums(self) -> dict[str, float]:
        """Of their absolute values. Experts' are left out: a step may send them no token."""
        return {
            name: float(parameter.detach().double().abs().sum())
            for name, parameter in self.parameters.items()
            if "lora_B" in name and ".experts." not in name
        }
