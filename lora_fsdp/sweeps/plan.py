"""What several adapters take and cost on GPUs, before any of them is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_fsdp.arguments import FineTuningArguments, LoraArguments
from lora_fsdp.placement.memory import DeviceMemory
from lora_fsdp.planning.candidates import Candidate
from lora_fsdp.planning.plan import Plan
from lora_fsdp.printing import cost_text
from lora_fsdp.sweeps.grid import asked_adapters
from lora_fsdp.sweeps.halving import stages

#: Settings that change neither memory nor time.
_FREE = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_type", "warmup_steps", "seed", "data_seed", "lora_alpha",
)  # fmt: skip


@dataclass(frozen=True)
class SweepPlan:
    """A sweep in turns over one base, on the GPUs of the plan's best strategy.

    Attributes:
        adapters, settings: how many.
        largest: the strategy of the adapter that needs most memory.
        seconds: of all of them, training and scoring; loading the base, once, not counted.
        cost: in the price's currency; `None` without a price.
        at_once: how many a shared pass would hold beside the base.
        does_not_fit: adapters for which there is no strategy on these GPUs.
    """

    adapters: int
    settings: int
    largest: Candidate
    seconds: float
    cost: float | None
    at_once: int
    does_not_fit: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """In bytes and seconds."""
        return {
            "adapters": self.adapters,
            "settings": self.settings,
            "seconds": self.seconds,
            "cost": self.cost,
            "bytes": self.largest.memory.total,
            "best_at_once": 1,
            "shared_pass_holds": self.at_once,
            "does_not_fit": list(self.does_not_fit),
        }

    def lines(self, duration: Callable[[float], str]) -> list[str]:
        """In words; `duration` says seconds."""
        cost = "" if self.cost is None else f", costs {cost_text(self.cost)}"
        one = self.largest
        found = [
            f"The sweep: {self.adapters} adapters of {self.settings} settings, in turns over one "
            f"base on {one.count} x {one.gpu.name}: {duration(self.seconds)}{cost}, up to "
            f"{one.memory.total / 1e9:.1f} GB on each GPU.",
            "At once: 1 unless --adapters_at_once says more, as is planned here; memory would hold "
            f"about {self.at_once} in a shared pass, which is faster where the base is whole on "
            "each GPU.",
        ]
        if self.does_not_fit:
            found.append(f"Nothing fits for: {', '.join(self.does_not_fit)}.")
        return found


def plan_sweep(
    training: FineTuningArguments,
    lora: LoraArguments,
    *,
    plan: Plan,
    plan_of: Callable[[Mapping[str, Any], LoraArguments], Plan],
) -> SweepPlan | None:
    """Plan every adapter; `None` where nothing fits for any of them.

    Args:
        training, lora: the run's arguments.
        plan: of one adapter with them.
        plan_of: the same with other values of the training's arguments, and of the adapter's.
    """
    asked = asked_adapters(training)
    known: dict[str, Candidate | None] = {}
    found: dict[str, Candidate | None] = {}
    for one in asked:
        own = {name: value for name, value in one.values.items() if name not in _FREE}
        if (key := repr(sorted(own.items()))) not in known:
            other = plan_of(one.training_values, one.adapter(lora)) if own else plan
            known[key] = _alike(other, plan.best)
        found[one.name] = known[key]
    fitting = [candidate for candidate in found.values() if candidate is not None]
    if not fitting:
        return None
    settings = len({one.setting for one in asked})
    part = share_of_halving(settings) if training.search == "halving" else 1.0
    costs = [candidate.cost for candidate in fitting if candidate.cost is not None]
    largest = max(fitting, key=lambda candidate: candidate.memory.total)
    return SweepPlan(
        adapters=len(asked),
        settings=settings,
        largest=largest,
        seconds=part * sum(candidate.seconds for candidate in fitting),
        cost=part * sum(costs) if costs else None,
        at_once=adapters_that_fit(largest.memory, free=largest.placement.free or 0),
        does_not_fit=[name for name, candidate in found.items() if candidate is None],
    )


def adapters_that_fit(memory: DeviceMemory, *, free: int) -> int:
    """How many adapters of this size a shared pass holds: each has its own parameters, moments and
    part of the sequence, and all share the base. At least 1.
    """
    own = memory.adapter + memory.gradients + memory.optimizer + memory.activations + memory.logits
    return max(1, (free - (memory.allocated - own)) // max(own, 1))


def share_of_halving(settings: int) -> float:
    """Of the steps of all settings, those that successive halving makes."""
    done, before = 0.0, 0.0
    for stage in stages(settings):
        done += stage.settings * (stage.share - before)
        before = stage.share
    return done / settings


def _alike(plan: Plan, chosen: Candidate | None) -> Candidate | None:
    """On the same GPUs, and with the same strategy if it fits there."""
    if chosen is None:
        return plan.best
    here = [
        one
        for one in plan.candidates
        if one.fits and (one.gpu, one.count) == (chosen.gpu, chosen.count)
    ]
    same = [
        one
        for one in here
        if one.strategy == chosen.strategy
        and one.placement.layout.quantized == chosen.placement.layout.quantized
    ]
    return min(same or here, key=lambda one: one.seconds, default=None)
