"""The adapter on every rank: equal at the start, gradients summed, checked to stay equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from lora_fsdp.distributed.launch import check_ranks_agree
from lora_fsdp.errors import AdapterVerificationError


class ReplicatedParameters:
    """The trained parameters, held whole by every rank.

    Args:
        parameters: by name, the same on every rank, float32.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self._b_at_start = self._b_checksums()

    def broadcast(self) -> None:
        """Give every rank rank 0's values."""
        if not _is_distributed():
            return
        for parameter in self.parameters.values():
            dist.broadcast(parameter.data, src=0)

    def sum_gradients(self) -> None:
        """Sum the gradients over all ranks: one flat float32 all-reduce.

        The sum is right, not the mean, because each rank's loss is already divided by the number
        of label tokens of all ranks. A parameter without a gradient counts as zero.
        """
        if not _is_distributed():
            return
        flat = torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in self.parameters.values()
            ]
        )
        dist.all_reduce(flat)
        pieces = flat.split([p.numel() for p in self.parameters.values()])
        for parameter, piece in zip(self.parameters.values(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

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
                f"optimizer step on this rank (for example {still[0]}): the learning rate is 0 or "
                "their gradients do not arrive."
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


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
