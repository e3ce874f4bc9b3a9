"""A run of several adapters: who shares a pass, each trained, one summary of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from peft import LoraConfig
from transformers import PreTrainedModel

from lora_fsdp.arguments import DataArguments, FineTuningArguments
from lora_fsdp.base.folders import read_json_object
from lora_fsdp.compute.architectures import why_apart
from lora_fsdp.errors import ArgumentError, ResumeMismatchError
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.printing import say
from lora_fsdp.ranks import on_first_rank, rank
from lora_fsdp.sweeps.earlier import PLAN_FILE
from lora_fsdp.sweeps.grid import asked_adapters
from lora_fsdp.sweeps.once import Once
from lora_fsdp.sweeps.outcome.summary import Summary
from lora_fsdp.sweeps.outcome.summing_up import sum_up
from lora_fsdp.sweeps.passes import train_over_one_pass
from lora_fsdp.sweeps.sharing import Groups, group
from lora_fsdp.sweeps.turns import RanAlone, RunAlone, train_in_turn

_Members = Mapping[str, tuple[FineTuningArguments, LoraConfig]]


@dataclass(frozen=True)
class Several:
    """A run of several adapters. Every method is a collective call.

    Attributes:
        once: what they have in common.
        train_alone: trains and scores one adapter by itself, into its folder.
    """

    once: Once
    train_alone: Callable[[RunAlone], RanAlone]

    def run(self) -> Summary:
        """Train and score every adapter that is not finished yet, and sum up.

        Raises:
            ArgumentError: options that contradict each other.
            SplitError: there are too few rows.
            ResumeMismatchError: the folder holds a run of other adapters.
        """
        once = self.once
        members = {
            one.name: (one.arguments(once.training, once.root), once.config(one))
            for one in once.asked
        }
        groups = self.groups(members)
        self._announce(groups)
        on_first_rank(lambda: self._note_plan(members))
        for number, names in enumerate(groups.together):
            train_over_one_pass(once, number, {name: members[name] for name in names})
        for name in groups.apart:
            train_in_turn(once, once.of(name), members[name][0], train_alone=self.train_alone)
        return on_first_rank(lambda: sum_up(once))

    def groups(self, members: _Members) -> Groups:
        """Who of those that are not finished shares a pass."""
        once = self.once
        model = once.base.look(once.config(once.asked[0]))
        return group(
            {name: member for name, member in members.items() if not once.is_finished(name)},
            base=model.config,
            at_once=once.training.adapters_at_once,
            on_gpu=once.training.device.type == "cuda",
            why_all_apart=self._why_all_apart(model),
        )

    def _why_all_apart(self, model: PreTrainedModel) -> str | None:
        """Why no adapters of this base and task can share a pass; `None` = nothing says so."""
        task = self.once.data.task
        if (objective := task.answer_kind.objective) != "supervised":
            return f"task {task.name} is learnt by the objective {objective}"
        return why_apart(model)

    def _announce(self, groups: Groups) -> None:
        if rank() != 0:
            return
        once = self.once
        done = [one.name for one in once.asked if once.is_finished(one.name)]
        train, held_out = once.rows.of(once.asked[0].fold)
        test = f", {len(once.rows.test)} to tell the best on" if once.rows.test else ""
        say(
            f"Task {once.data.task.name}: {len(once.asked)} adapters, each with {len(train)} "
            f"training rows and {len(held_out)} to be scored on{test}"
        )
        say(str(groups))
        if done:
            say(f"  finished before: {', '.join(done)}")
        say("", flush=True)

    def _note_plan(self, members: _Members) -> None:
        """What this run consists of, or the check that it is what the folder holds."""
        once = self.once
        plan = {
            "adapters": {
                one.name: {"values": dict(one.values), "seed": one.seed, "fold": one.fold}
                for one in once.asked
            },
            "rows": [example.row for example in [*once.data.train, *once.data.scored]],
        }
        plan = json.loads(json.dumps(plan, default=str))
        file = once.root / PLAN_FILE
        if once.training.resume_from_checkpoint and file.is_file():
            before = read_json_object(once.root, PLAN_FILE)
            if before.get("adapters") != plan["adapters"] or before.get("rows") != plan["rows"]:
                raise ResumeMismatchError(
                    f"{once.root} holds a run of other adapters or rows: give the options it was "
                    "started with, or choose another --output_dir."
                )
        write_json(file, plan)


def check_several(training: FineTuningArguments, data: DataArguments) -> None:
    """Refuse what a run of several adapters cannot do, before anything is read.

    Raises:
        ArgumentError: names the options.
    """
    asked_adapters(training)
    if training.folds is not None and (training.seeds > 1 or training.grid is not None):
        raise ArgumentError("--folds goes with neither --seeds nor --grid: keep one of them.")
    if training.folds is not None:
        for name in ("eval_file", "test_file", "test_size"):
            if getattr(data, name) is not None:
                raise ArgumentError(
                    f"--folds holds every row out once, so that --{name} would be ignored: leave "
                    "one out."
                )
    if training.samples is not None and training.grid is None:
        raise ArgumentError("--samples takes settings of a --grid at random: give one.")
    if isinstance(training.resume_from_checkpoint, str):
        raise ArgumentError(
            "Several adapters go on from where each of them was: --resume_from_checkpoint true."
        )
    for name in ("push_to_hub", "max_hours"):
        if getattr(training, name):
            raise ArgumentError(f"--{name} is for a run of one adapter: leave it out.")
