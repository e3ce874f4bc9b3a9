"""The optimizer steps of several adapters on their device, without waiting for it.

Norm, clipping, and AdamW by torch's fused kernel, one after the other for each adapter, with all
that changes from step to step in tensors. An adapter whose loss or gradient is not finite keeps its
parameters from then on; the host learns of it when it reads what the step came to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from lora_fsdp.training.step.graph_recording import GraphRecorder, Replayed
from lora_fsdp.training.together.members import Member


def can_update_on_device(members: Sequence[Member]) -> bool:
    """Whether all have AdamW as the Trainer makes it."""
    return all(
        type(member.optimizer) is torch.optim.AdamW
        and len(member.optimizer.param_groups) == 1
        and not member.optimizer.param_groups[0]["amsgrad"]
        and not member.optimizer.param_groups[0]["maximize"]
        for member in members
    )


class Outcome:
    """Numbers on their way from the device.

    Args:
        numbers: may be overwritten afterwards.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not numbers.is_cuda:
            self._numbers = numbers.clone()
            return
        self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
        self._numbers.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> list[list[float]]:
        """The numbers, [rows][columns], once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return cast(list[list[float]], self._numbers.tolist())


class DeviceUpdates:
    """Updates adapters by the gradients in their block.

    The moments and the number of steps stay in the state of each one's own optimizer, which writes
    and reads checkpoints as ever.

    Args:
        members: whose optimizers `can_update_on_device` takes.
        losses: [members], the step's, over all ranks; read at every call.
        recorder: of graphs; `None` = everything is launched.
    """

    def __init__(
        self, members: Sequence[Member], losses: torch.Tensor, recorder: GraphRecorder | None
    ) -> None:
        self.members, self._losses = list(members), losses
        limits = [member.plan.args.max_grad_norm or 0.0 for member in members]
        self._limits = torch.tensor([limit if limit > 0 else torch.inf for limit in limits])
        self._limits = self._limits.to(losses)
        # On a CPU a rate is read as it is; a GPU's kernel reads float32.
        dtype = torch.float32 if losses.is_cuda else torch.float64
        self._rates = torch.zeros(len(members), device=losses.device, dtype=dtype)
        self._norms = torch.zeros_like(losses)
        self._stopped = torch.zeros_like(losses)
        self._states = [_adopt(member, losses.device) for member in members]
        self._update = Replayed(self._compute, recorder)

    @torch.no_grad()
    def __call__(self) -> Outcome:
        """Update all; losses and norms before clipping, [2][members]."""
        rates = [member.optimizer.param_groups[0]["lr"] for member in self.members]
        held = torch.tensor(rates, dtype=self._rates.dtype)
        on_gpu = self._rates.is_cuda
        self._rates.copy_(held.pin_memory() if on_gpu else held, non_blocking=True)
        self._update()
        return Outcome(torch.stack([self._losses, self._norms]))

    @torch.no_grad()
    def _compute(self) -> None:
        gradients = [member.adapter.gradients for member in self.members]
        self._norms.copy_(torch.stack(torch._foreach_norm(gradients)))
        factors = torch.clamp(self._limits / (self._norms + 1e-6), max=1.0)
        for gradient, factor in zip(gradients, factors.unbind(), strict=True):
            gradient.mul_(factor)
        finite = self._losses.isfinite() & self._norms.isfinite()
        self._stopped.masked_fill_(~finite, 1.0)
        each = zip(self.members, self._states, self._rates, self._stopped, strict=True)
        for member, (step, first, second), rate, stopped in each:
            group = member.optimizer.param_groups[0]
            parameters: list[torch.Tensor] = list(member.adapter.parameters.values())
            step.add_(1.0 - stopped)
            torch._fused_adamw_(
                parameters,
                [cast(torch.Tensor, parameter.grad) for parameter in parameters],
                first,
                second,
                [],
                [step] * len(parameters),
                lr=rate,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=stopped,
            )


def _adopt(
    member: Member, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The state of the member's optimizer: its number of steps, which its parameters share from now
    on, and both moments of each parameter.
    """
    state = member.optimizer.state
    parameters = list(member.adapter.parameters.values())
    before = state[parameters[0]].get("step", 0.0) if parameters[0] in state else 0.0
    step = torch.tensor(float(before), device=device)
    for parameter in parameters:
        own = state[parameter]
        own.setdefault("exp_avg", torch.zeros_like(parameter))
        own.setdefault("exp_avg_sq", torch.zeros_like(parameter))
        own["step"] = step
    # Its `step` is never called, of which a scheduler would warn.
    member.optimizer._opt_called = True  # type: ignore[attr-defined]
    return (
        step,
        [state[parameter]["exp_avg"] for parameter in parameters],
        [state[parameter]["exp_avg_sq"] for parameter in parameters],
    )
