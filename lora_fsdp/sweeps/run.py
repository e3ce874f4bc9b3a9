"""A run of several adapters: who shares a pass, each trained, one summary of all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from peft import LoraConfig
from transformers import PreTrainedModel

from lora_fsdp.adapter.targets import resolve_targets
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.folders import read_json_object
from lora_fsdp.compute.architectures import why_apart
from lora_fsdp.compute.shared_pass import why_model_apart
from lora_fsdp.errors import ResumeMismatchError, TargetModulesError
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.printing import say
from lora_fsdp.ranks import on_first_rank, rank
from lora_fsdp.sweeps.earlier import PLAN_FILE, STOPPED_FILE, TOGETHER
from lora_fsdp.sweeps.halving import Scores, Stage, best_settings, stages
from lora_fsdp.sweeps.once import Once
from lora_fsdp.sweeps.outcome.member import is_loss
from lora_fsdp.sweeps.outcome.summary import Summary
from lora_fsdp.sweeps.outcome.summing_up import sum_up
from lora_fsdp.sweeps.passes import note_stopped, train_over_one_pass
from lora_fsdp.sweeps.sharing import Groups, group
from lora_fsdp.sweeps.turns import TrainAlone, train_in_turn

_Members = Mapping[str, tuple[FineTuningArguments, LoraConfig]]


@dataclass(frozen=True)
class Several:
    """A run of several adapters. Every method is a collective call.

    Attributes:
        once: what they have in common.
        train_alone: trains and scores one adapter by itself.
    """

    once: Once
    train_alone: TrainAlone

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
        self._check_targets(members)
        self._announce(groups)
        on_first_rank(self._note_plan)
        if once.training.search == "halving":
            self._halve(members)
        else:
            self._train(members)
        for left in once.root.glob(f"{TOGETHER}-*"):  # of a session that was killed
            on_first_rank(partial(shutil.rmtree, left, ignore_errors=True))
        return on_first_rank(lambda: sum_up(once))

    def _train(
        self,
        members: _Members,
        stage: Stage | None = None,
        note: Callable[[Mapping[str, float | None]], None] = lambda scores: None,
    ) -> None:
        """Train those that are not finished, to the end or up to that of a stage.

        Args:
            members: arguments and settings of each, by its name.
            stage: up to where; `None` = to the end.
            note: is told the scores at the end of a stage.
        """
        groups = self.groups(members)
        for names in groups.together:
            sharing = {name: members[name] for name in names}
            note(train_over_one_pass(self.once, sharing, stage))
        for name in groups.apart:
            one, arguments = self.once.of(name), members[name][0]
            score = train_in_turn(
                self.once, one, arguments, train_alone=self.train_alone, stage=stage
            )
            note({name: score})

    def _halve(self, members: _Members) -> None:
        """Train all up to a share of their steps, and the best ones on, stage by stage."""
        once, sign = self.once, -1 if is_loss(self.once.data.task.primary_metric) else 1
        setting_of = {one.name: one.setting for one in once.asked}
        *early, last = stages(len(set(setting_of.values())))
        resumes = bool(once.training.resume_from_checkpoint)
        scores, left = on_first_rank(lambda: Scores.begin(once.root, resumes)), list(members)
        for stage, after in pairwise([*early, last]):
            missing = [name for name in left if name not in scores.at(stage.number)]
            note = partial(self._note_scores, scores, stage)
            self._train({name: members[name] for name in missing}, stage, note)
            found = {name: scores.at(stage.number).get(name) for name in left}
            on = best_settings(found, setting_of, keep=after.settings, sign=sign)
            out = [name for name in left if setting_of[name] not in on]
            on_first_rank(partial(self._leave_out, out, stage))
            left = [name for name in left if name not in out]
        self._train({name: members[name] for name in left}, last)

    def _note_scores(self, scores: Scores, stage: Stage, found: Mapping[str, float | None]) -> None:
        scores.at(stage.number).update(found)
        on_first_rank(scores.save)

    def _leave_out(self, names: Sequence[str], stage: Stage) -> None:
        """Say who does not go on, and write it into their folders."""
        say(f"\nAfter {stage.described}: {', '.join(names)} left out.", flush=True)
        for name in names:
            folder = self.once.root / name
            if not (folder / STOPPED_FILE).is_file():  # where it has diverged, that stands there
                note_stopped(folder, f"left out after {stage.described}")

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

    def _check_targets(self, members: _Members) -> None:
        """Refuse targets that the base does not have, of whichever adapter, before it is read."""
        first = self.once.asked[0]
        model = self.once.base.look(self.once.config(first))
        for name, (_, config) in members.items():
            try:
                resolve_targets(model, deepcopy(config))
            except TargetModulesError as error:
                raise TargetModulesError(f"{name}: {error}") from error

    def _why_all_apart(self, model: PreTrainedModel) -> str | None:
        """Why no adapters of this base and task can share a pass; `None` = nothing says so."""
        task = self.once.data.task
        if (objective := task.answer_kind.objective) != "supervised":
            return f"task {task.name} is learnt by the objective {objective}"
        return why_apart(model) or why_model_apart(model)

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

    def _note_plan(self) -> None:
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
