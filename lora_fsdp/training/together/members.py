"""An adapter among several that are trained at once: its own data, optimizer, schedule, and log."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, get_scheduler

from lora_fsdp.adapter.adapter_set import Adapter
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.sampling import TrainingStep, TrainingSteps
from lora_fsdp.data.schedule import Schedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemberPlan:
    """What one adapter of several is to be.

    Attributes:
        name: as results and messages call it.
        args: its run's; `output_dir` is where it goes.
        config: its settings.
        train: its examples.
    """

    name: str
    args: FineTuningArguments
    config: LoraConfig
    train: Sequence[EncodedExample]

    @property
    def order_seed(self) -> int:
        """Seed of the order of examples."""
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)


class StepMade(NamedTuple):
    """An optimizer step of an adapter: which one, counted from 1, and its learning rate."""

    step: int
    rate: float


@dataclass(eq=False)
class Member:
    """An adapter while it is trained.

    Attributes:
        plan: what it is to be.
        adapter_name: what PEFT calls it.
        adapter: its parameters, and its part of the block of gradients.
        steps: this rank's share of each of its optimizer steps.
        last: optimizer steps of its whole run.
        optimizer, scheduler: its own.
        step: optimizer steps made.
        moved: whether one of them had a learning rate.
        stopped: why it was stopped before its end; `None` = it was not.
        until: the step after which it leaves the pass, to go on in another; `None` = its last.
        log: entries as the Trainer's `log_history` has them.
    """

    plan: MemberPlan
    _: KW_ONLY
    adapter_name: str
    adapter: Adapter
    steps: TrainingSteps
    last: int
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    step: int = 0
    moved: bool = False
    stopped: str | None = None
    until: int | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    _epoch: int = 0
    _loss: float = 0.0
    _losses: int = 0

    @property
    def is_live(self) -> bool:
        """Whether it has a step left to make."""
        return self.stopped is None and self.step < (
            self.last if self.until is None else self.until
        )

    def share(self) -> TrainingStep:
        """This rank's share of its next step."""
        epoch, place = divmod(self.step, len(self.steps))
        if epoch != self._epoch:
            self.steps.set_epoch(epoch)
            self._epoch = epoch
        return self.steps[place]

    def clip(self) -> torch.Tensor:
        """Clip its gradients by their own norm; the norm before, on the device."""
        limit = self.plan.args.max_grad_norm
        if limit is None or limit <= 0:
            return self.adapter.gradient_norm()
        return self.adapter.clip_gradients(limit)

    def update(self, loss: float, norm: float) -> None:
        """Make the step whose gradients are there, or stop here if they are not finite.

        Args:
            loss: the step's, over all ranks.
            norm: of its gradients before clipping.
        """
        if not self.stops(loss, norm, step=self.step + 1):
            self.optimizer.step()
            self.take_in(loss, norm, self.advance())

    def advance(self) -> StepMade:
        """Go on to the next step, once this one's update is made or on its way."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step()
        self.step += 1
        self.moved = self.moved or rate > 0
        return StepMade(self.step, rate)

    def stops(self, loss: float, norm: float, *, step: int) -> bool:
        """Stop before `step` if what it came to is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return False
        what = "loss" if not math.isfinite(loss) else "gradient"
        self.stopped = f"its {what} was not finite at step {step} of {self.last}"
        self.step = step - 1
        logger.warning("%s stops: %s. The others go on.", self.plan.name, self.stopped)
        return True

    def take_in(self, loss: float, norm: float, made: StepMade) -> None:
        """What a step came to, for the log."""
        self._loss, self._losses = self._loss + loss, self._losses + 1
        every = max(1, int(self.plan.args.logging_steps))
        if made.step % every == 0 or made.step == self.last:
            self._note(norm, made)

    def state(self) -> dict[str, Any]:
        """All that its next step depends on, for `write_state`."""
        return {
            "parameters": {
                self._alone(name): value.data for name, value in self.adapter.parameters.items()
            },
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "moved": self.moved,
            "stopped": self.stopped,
            "log": self.log,
            "since_log": [self._loss, self._losses],
        }

    def put_back(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, value in self.adapter.parameters.items():
            value.data.copy_(state["parameters"][self._alone(name)])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.moved, self.stopped = state["step"], state["moved"], state["stopped"]
        self.log = state["log"]
        self._loss, self._losses = state["since_log"]

    def _alone(self, name: str) -> str:
        """A parameter's name in a model of this adapter alone, whatever it is called in a pass."""
        return name.replace(f".{self.adapter_name}.", ".default.")

    def _note(self, norm: float, made: StepMade) -> None:
        self.log.append(
            {
                "loss": self._loss / self._losses,
                "grad_norm": norm,
                "learning_rate": made.rate,
                "epoch": made.step / len(self.steps),
                "step": made.step,
            }
        )
        self._loss, self._losses = 0.0, 0


def make_member(
    plan: MemberPlan,
    *,
    adapter_name: str,
    adapter: Adapter,
    steps: TrainingSteps,
    model: PeftModel,
) -> Member:
    """A member with the optimizer and the schedule that the Trainer would give it alone."""
    args = plan.args
    last = Schedule.of(vars(args), rows=len(plan.train), ranks=args.world_size).steps
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, model))
    optimizer = kind(_groups(adapter, args), **options)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(last),
        num_training_steps=last,
        scheduler_specific_kwargs=cast(dict[str, Any] | None, args.lr_scheduler_kwargs),
    )
    return Member(
        plan,
        adapter_name=adapter_name,
        adapter=adapter,
        steps=steps,
        last=last,
        optimizer=optimizer,
        scheduler=scheduler,
    )


def _groups(adapter: Adapter, args: FineTuningArguments) -> list[dict[str, Any]]:
    """A and B matrices all decay, as with the Trainer, which spares biases and norms only."""
    return [{"params": list(adapter.parameters.values()), "weight_decay": args.weight_decay}]
