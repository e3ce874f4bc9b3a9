"""Steps whose loss or gradient is NaN or infinite, noticed without waiting for the device.

Whether a step was finite is known to the device long before the host may ask. So the device keeps
the number of the first bad step itself, and from then on nothing reaches the optimizer: gradients
are zero, and a fused optimizer is told to do nothing (`found_inf`, which loss scaling uses). The
host looks where it waits for the device anyway: at the log, and before a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.ranks import from_every_rank


@dataclass(frozen=True)
class BadStep:
    """The first step that was not finite.

    Attributes:
        step: its number, from 1.
        losses: ranks whose own loss was NaN or infinite.
        gradients: ranks whose own gradient was; none = only the sum over ranks was.
    """

    step: int
    losses: list[int]
    gradients: list[int]

    @property
    def ranks(self) -> list[int]:
        """The ranks it came from; none = only the sum over ranks was not finite."""
        return sorted({*self.losses, *self.gradients})


class FiniteSteps:
    """Holds the adapter still from the first step whose loss or gradient is not finite.

    Args:
        adapters: their gradients.
        device: where they are.
    """

    def __init__(self, adapters: AdapterSet, device: torch.device) -> None:
        self.adapters = adapters
        self.holds_optimizer = False
        self._now = torch.zeros(2, dtype=torch.bool, device=device)
        # The step (0: none), whether it was this rank's loss, whether its gradient.
        self._first = torch.zeros(3, dtype=torch.int64, device=device)
        self._stopped = torch.zeros((), dtype=torch.float32, device=device)

    def hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Have a fused optimizer leave weights and state alone once a step was not finite.

        Others get gradients of zero, by which momentum and weight decay still move weights.
        """
        self.holds_optimizer = all(group.get("fused") for group in optimizer.param_groups)
        if self.holds_optimizer:
            optimizer.found_inf = self._stopped  # type: ignore[attr-defined]

    def see_rank(self, loss: torch.Tensor) -> None:
        """Look at this rank's loss and gradient, before they are summed over ranks.

        A loss that is not finite makes the summed gradient so too: every rank then sees it.
        """
        finite = torch.stack([loss.float(), self.adapters.gradient_norm()]).isfinite()
        torch.logical_not(finite, out=self._now)
        self.adapters.gradients[:1].masked_fill_(self._now.any(), torch.nan)

    def see_sum(self, norm: torch.Tensor, *, step: int) -> None:
        """Look at the norm of the summed gradient, which is the same on every rank."""
        bad = norm.isfinite().logical_not()
        first = bad & (self._stopped == 0)
        self._first[:1].masked_fill_(first, step)
        self._first[1:].copy_(torch.where(first, self._now.long(), self._first[1:]))
        self._stopped.masked_fill_(bad, 1.0)
        self.adapters.gradients.masked_fill_(self._stopped.bool(), 0.0)

    def first_bad_step(self) -> BadStep | None:
        """The first bad step, if there was one. Waits for the device; a collective call."""
        step, *mine = self._first.tolist()
        if step == 0:  # on every rank
            return None
        flags = from_every_rank(mine)
        losses, gradients = ([r for r, flag in enumerate(flags) if flag[i]] for i in (0, 1))
        return BadStep(step, losses, gradients)
