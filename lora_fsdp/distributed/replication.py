"""The adapter on every rank: equal at the start, gradients summed, checked to stay equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from lora_fsdp.errors import AdapterVerificationError
from lora_fsdp.ranks import check_ranks_agree, sum_over_ranks, take_from_first


class ReplicatedParameters:
    """The trained parameters, held whole by every rank.

    Args:
        parameters: by name, the same on every rank, float32.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self._b_at_start = self._b_checksums()
        values = list(self.parameters.values())
        self._gradients = torch.cat([torch.zeros_like(value).flatten() for value in values])
        pieces = self._gradients.split([value.numel() for value in values])
        self._views = [
            (value, piece.view_as(value)) for value, piece in zip(values, pieces, strict=True)
        ]

    def zero_gradients(self) -> None:
        """Set every gradient to zero, in one block of memory that stays where it is.

        A captured step needs fixed addresses, and the ranks' sum needs no copy.
        """
        self._gradients.zero_()
        for value, gradient in self._views:
            value.grad = gradient

    def broadcast(self) -> None:
        """Give every rank rank 0's values."""
        for parameter in self.parameters.values():
            take_from_first(parameter.data)

    def copy_gradients(self) -> torch.Tensor:
        """All gradients, flat."""
        return self._gradients.clone()

    def set_gradients(self, gradients: torch.Tensor) -> None:
        """Put back what `copy_gradients` gave."""
        self._gradients.copy_(gradients)

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm of all gradients, on the device."""
        return torch.linalg.vector_norm(self._gradients)

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, on the one block; the norm before clipping."""
        norm = self.gradient_norm()
        self._gradients.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def spoil_gradients(self, condition: torch.Tensor) -> None:
        """Where `condition` (a bool on the device) holds, make the gradient, and its sum, NaN."""
        self._gradients[:1].masked_fill_(condition, torch.nan)

    def zero_gradients_where(self, condition: torch.Tensor) -> None:
        """Where `condition` (a bool on the device) holds, set every gradient to zero."""
        self._gradients.masked_fill_(condition, 0.0)

    def drop_gradients(self, set_to_none: bool = True) -> None:
        """As `nn.Module.zero_grad`, without walking through the frozen base."""
        for value, _ in self._views:
            value.grad = None

    def sum_gradients(self) -> None:
        """Sum the gradients over all ranks: one flat float32 all-reduce.

        The sum is right, not the mean, because each rank's loss is already divided by the number
        of label tokens of all ranks. A parameter without a gradient counts as zero.
        """
        sum_over_ranks(self._gradients)

    def check_equal(self) -> None:
        """Check that every rank holds the same bits.

        Raises:
            RankMismatchError: the adapter has drifted apart.
        """
        check_ranks_agree({"the adapter's weights (SHA-256)": self.fingerprint()})

    def check_moved(self) -> None:
        """Check on this rank that training has moved every `lora_B`, which starts at zero.

        Those of experts are left out: a step may send them no token.

        Raises:
            AdapterVerificationError: names those that did not move.
        """
        still = [
            name for name, value in self._b_checksums().items() if value == self._b_at_start[name]
        ]
        if still:
            raise AdapterVerificationError(
                f"{len(still)} of {len(self._b_at_start)} lora_B did not move in the first "
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

    def _b_checksums(self) -> dict[str, float]:
        return {
            name: float(parameter.detach().double().abs().sum())
            for name, parameter in self.parameters.items()
            if "lora_B" in name and ".experts." not in name
        }
