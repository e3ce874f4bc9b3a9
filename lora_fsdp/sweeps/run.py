"""A run of several adapters: the base opened once, the untrained model scored once, one summary."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.adapter.probes import build_probes
from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.base.folders import read_json_object
from lora_fsdp.base.streaming import StoredBase, WholeBase, open_base
from lora_fsdp.compute.architectures import why_apart
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.rows import TaskData, encoder_of
from lora_fsdp.data.sampling import ScoringSequences
from lora_fsdp.errors import ArgumentError, ResumeMismatchError
from lora_fsdp.evaluation.comparison import Comparison, compare
from lora_fsdp.evaluation.metrics import evaluation_metrics
from lora_fsdp.evaluation.outputs import LOG_FILE, write_json
from lora_fsdp.evaluation.untrained import AS_TRAINED
from lora_fsdp.printing import say
from lora_fsdp.ranks import on_first_rank, rank
from lora_fsdp.reporting.model_card import try_to_write_card
from lora_fsdp.reporting.run_files import METRICS_FILE, read_run
from lora_fsdp.reporting.side_by_side import write_comparison
from lora_fsdp.sweeps.earlier import PLAN_FILE, REPORT_FILE, TOGETHER
from lora_fsdp.sweeps.grid import Asked, asked_adapters
from lora_fsdp.sweeps.label_errors import write_label_errors
from lora_fsdp.sweeps.results import MemberResult, Summary
from lora_fsdp.sweeps.rows import RowsOfRun, rows_of_run
from lora_fsdp.sweeps.sharing import Groups, group
from lora_fsdp.tasks import Example
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.training.prepared import longest_answer
from lora_fsdp.training.rivals import Untrained, rows_to_probe, score_base
from lora_fsdp.training.saving.adapter_writer import AdapterWriter
from lora_fsdp.training.saving.atomic_folders import atomic_files
from lora_fsdp.training.scorer import RunScorer
from lora_fsdp.training.step.objectives.choice import objective_of
from lora_fsdp.training.together.loop import AdaptersTogether
from lora_fsdp.training.together.members import Member, MemberPlan

logger = logging.getLogger(__name__)

_TEST_FILE = "test_metrics.json"
_STOPPED_FILE = "stopped.json"


@dataclass(frozen=True)
class RunAlone:
    """What a member that shares no pass is trained with.

    Attributes:
        lora, training: its own arguments.
        data: its examples.
        untrained: what the untrained model gives for its held-out rows, if that is known.
        test: rows of which only the tuned model's answers are wanted.
    """

    lora: LoraArguments
    training: FineTuningArguments
    data: TaskData
    untrained: Untrained | None
    test: list[Example]


@dataclass(frozen=True)
class RanAlone:
    """What it came to, and what the untrained model gives for its held-out rows.

    `test` is `None` where there are no test rows.
    """

    comparison: Comparison
    untrained: Untrained
    test: ModelOutputs | None


@dataclass(frozen=True, kw_only=True)
class Several:
    """A run of several adapters. Every method is a collective call.

    Attributes:
        model, lora, data_args, training: the arguments.
        data: task and examples.
        tokenizer: the base's.
        train_alone: trains and scores one adapter by itself, into its folder.
    """

    model: ModelArguments
    lora: LoraArguments
    data_args: DataArguments
    training: FineTuningArguments
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    train_alone: Callable[[RunAlone], RanAlone]

    # ---- what is asked for ----------------------------------------------------------------------

    @property
    def root(self) -> Path:
        """The output folder; each adapter has a folder in it."""
        return Path(str(self.training.output_dir))

    @cached_property
    def asked(self) -> list[Asked]:
        """The adapters."""
        return asked_adapters(self.training)

    @property
    def chooses(self) -> bool:
        """Whether there are several settings to choose from."""
        return len({one.setting for one in self.asked}) > 1

    @cached_property
    def rows(self) -> RowsOfRun:
        """Which examples each adapter gets."""
        return rows_of_run(
            self.data,
            folds=self.training.folds,
            chooses=self.chooses,
            eval_size=self.data_args.eval_size,
            seed=int(self.training.seed),
        )

    @cached_property
    def encoder(self) -> Encoder:
        """Of all examples."""
        return encoder_of(self.data_args, self.tokenizer, task=self.data.task)

    @cached_property
    def encoded(self) -> dict[int, EncodedExample]:
        """Every example as tokens, once, by the identity of the example."""
        everything = [*self.data.train, *self.data.scored]
        return {
            id(example): tokens
            for example, tokens in zip(everything, self.encoder.encode(everything), strict=True)
        }

    def tokens(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Of `examples`, which are the run's."""
        return [self.encoded[id(example)] for example in examples]

    # ---- the run --------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Train and score every adapter that is not finished yet, and sum up.

        Raises:
            ArgumentError: options that contradict each other.
            SplitError: there are too few rows.
            ResumeMismatchError: the folder holds a run of other adapters.
        """
        members = {
            one.name: (one.arguments(self.training, self.root), self._config(one))
            for one in self.asked
        }
        base = self._open()
        groups = group(
            {name: member for name, member in members.items() if not self.is_finished(name)},
            base=_model_of(base).config,
            at_once=self.training.adapters_at_once,
            on_gpu=self.training.device.type == "cuda",
            why_all_apart=self._why_all_apart(_model_of(base)),
        )
        self._announce(groups)
        on_first_rank(lambda: self._note_plan(members))
        untrained: dict[int | None, Untrained] = {}
        for number, names in enumerate(groups.together):
            base = base if number == 0 else self._open()
            sharing = {name: members[name] for name in names}
            self._train_together(base, number, sharing, untrained)
        for name in groups.apart:
            self._train_apart(self._of(name), members[name][0], untrained)
        return on_first_rank(self._sum_up)

    def is_finished(self, name: str) -> bool:
        """Whether an earlier session has trained and scored this adapter, or found it diverging."""
        folder = self.root / name
        files = [METRICS_FILE, "adapter_config.json"] + [_TEST_FILE] * bool(self.rows.test)
        done = all((folder / file).is_file() for file in files)
        return bool(self.training.resume_from_checkpoint) and (
            done or (folder / _STOPPED_FILE).is_file()
        )

    def _of(self, name: str) -> Asked:
        return next(one for one in self.asked if one.name == name)

    def _config(self, one: Asked) -> LoraConfig:
        return lora_config(one.adapter(self.lora), revision=self.model.model_revision)

    def _open(self) -> StoredBase | WholeBase:
        return open_base(
            self.model, device=self.training.device, peft_config=self._config(self.asked[0])
        )

    def _why_all_apart(self, model: PreTrainedModel) -> str | None:
        """Why no adapters of this base and task can share a pass; `None` = nothing says so."""
        objective = self.data.task.answer_kind.objective
        if objective != "supervised":
            return f"task {self.data.task.name} is learnt by the objective {objective}"
        return why_apart(model)

    def _announce(self, groups: Groups) -> None:
        if rank() != 0:
            return
        done = [one.name for one in self.asked if self.is_finished(one.name)]
        train, held_out = self.rows.of(self.asked[0].fold)
        test = f", {len(self.rows.test)} to tell the best on" if self.rows.test else ""
        say(
            f"Task {self.data.task.name}: {len(self.asked)} adapters, each with {len(train)} "
            f"training rows and {len(held_out)} to be scored on{test}"
        )
        say(str(groups))
        if done:
            say(f"  finished before: {', '.join(done)}")
        say("", flush=True)

    def _note_plan(self, members: Mapping[str, tuple[FineTuningArguments, LoraConfig]]) -> None:
        """What this run consists of, or the check that it is what the folder holds."""
        plan = {
            "adapters": {
                one.name: {"values": dict(one.values), "seed": one.seed, "fold": one.fold}
                for one in self.asked
            },
            "rows": [example.row for example in [*self.data.train, *self.data.scored]],
        }
        plan = json.loads(json.dumps(plan, default=str))
        file = self.root / PLAN_FILE
        if self.training.resume_from_checkpoint and file.is_file():
            before = read_json_object(self.root, PLAN_FILE)
            if before.get("adapters") != plan["adapters"] or before.get("rows") != plan["rows"]:
                raise ResumeMismatchError(
                    f"{self.root} holds a run of other adapters or rows: give the options it was "
                    "started with, or choose another --output_dir."
                )
        write_json(file, plan)

    # ---- over one pass --------------------------------------------------------------------------

    def _train_together(
        self,
        base: StoredBase | WholeBase,
        number: int,
        members: Mapping[str, tuple[FineTuningArguments, LoraConfig]],
        untrained: dict[int | None, Untrained],
    ) -> None:
        """Train adapters that share a pass, save and score each."""
        place = self.root / f"{TOGETHER}-{number + 1}"
        plans = [
            MemberPlan(name, args, config, self.tokens(self.rows.of(self._of(name).fold)[0]))
            for name, (args, config) in members.items()
        ]
        common = copy(self.training)
        common.output_dir, common.step = str(place), "eager"
        together = AdaptersTogether(
            base,
            common,
            plans=plans,
            encoder=self.encoder,
            held_out=self.tokens(self.data.held_out),
            objective=objective_of(self.data.task, smoothing=0.0),
        )
        began = time.perf_counter()
        together.train(resume=bool(self.training.resume_from_checkpoint))
        seconds = time.perf_counter() - began
        for member in together.members:
            if member.stopped is None:
                self._finish(together, member, untrained, seconds=seconds)
            else:
                on_first_rank(partial(self._note_stopped, member))
        on_first_rank(lambda: shutil.rmtree(place, ignore_errors=True))

    def _note_stopped(self, member: Member) -> None:
        folder = self.root / member.plan.name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _STOPPED_FILE, {"why": member.stopped})

    def _finish(
        self,
        together: AdaptersTogether,
        member: Member,
        untrained: dict[int | None, Untrained],
        *,
        seconds: float,
    ) -> None:
        """Save an adapter as its own run would, then score it."""
        one = self._of(member.plan.name)
        folder = self.root / one.name
        train, held_out = self.rows.of(one.fold)
        scorer = self._scorer(together, member)
        with together.only(member):
            self._save(together, member, folder)
            tuned = scorer.outputs(self._loader(together, held_out))
            test = (
                scorer.outputs(self._loader(together, self.rows.test)) if self.rows.test else None
            )
        if one.fold not in untrained:
            with together.only(None):
                untrained[one.fold] = score_base(
                    scorer,
                    partial(self._loader_of_tokens, together),
                    learnt=rows_to_probe(self.data.task, member.plan.args, member.plan.train),
                    reported=self.tokens(held_out),
                )
        base = untrained[one.fold]

        comparison = compare(  # collective: the first rank makes the baselines for all
            self.data.task,
            train=train,
            held_out=self.tokens(held_out),
            untrained=base.ways[AS_TRAINED],
            ways=base.ways,
            rivals=base.answers,
            tuned=tuned,
            facts={**self._facts(together, member, seconds=seconds), **base.facts},
        )

        def write() -> None:
            self._write_log(member, folder)
            self._write_results(folder, comparison, test)
            try_to_write_card(folder)

        on_first_rank(write)

    def _scorer(self, together: AdaptersTogether, member: Member) -> RunScorer:
        return RunScorer(
            model=together.model,
            packed=together.packed,
            encoder=self.encoder,
            device=together.device,
            autocast=nullcontext,
            max_new_tokens=longest_answer(member.plan.args, member.plan.train),
        )

    def _save(self, together: AdaptersTogether, member: Member, folder: Path) -> None:
        writer = AdapterWriter(
            model=together.model,
            args=member.plan.args,
            encoder=self.encoder,
            max_new_tokens=longest_answer(member.plan.args, member.plan.train),
            base_fingerprint=together.base_fingerprint,
            probes=build_probes(self.encoder, [one.example for one in member.plan.train]),
            packed=together.packed,
            autocast=nullcontext,
            adapter=member.adapter_name,
        )
        answers = writer.answer_probes()

        def write() -> None:
            facts = together.facts | {"member": member.plan.name}
            with atomic_files(folder, facts, last="adapter_config.json") as partial:
                writer.write(partial, answers, goes_to=folder, trained=member.moved)

        on_first_rank(write)

    def _loader(self, together: AdaptersTogether, examples: Sequence[Example]) -> DataLoader[Any]:
        return self._loader_of_tokens(together, self.tokens(examples))

    def _loader_of_tokens(
        self, together: AdaptersTogether, examples: Sequence[EncodedExample]
    ) -> DataLoader[Any]:
        sequences = ScoringSequences(
            examples,
            rank=self.training.process_index,
            world_size=self.training.world_size,
            max_tokens=together.placement.sequence_length,
            packing=together.packed.packing,
        )
        return DataLoader(sequences, batch_size=1, collate_fn=itemgetter(0))

    def _facts(
        self, together: AdaptersTogether, member: Member, *, seconds: float
    ) -> dict[str, Any]:
        """As a run by itself writes them, as far as they are known of one adapter of several."""
        one = self._of(member.plan.name)
        train, held_out = self.rows.of(one.fold)
        schedule_examples = member.step * (len(train) / max(1, len(member.steps)))
        return {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "task": self.data.task.name,
            "labels": list(self.data.task.answer_kind.labels),
            "training_rows": len(train),
            "held_out_rows": len(held_out),
            "rows_left_out": self.data.dropped,
            "rows_shortened": sum(e.shortened for e in self.tokens([*train, *held_out])),
            "processes": self.training.world_size,
            "steps": member.step,
            "first_step": 0,
            # Of all adapters of the pass.
            "training_seconds": seconds,
            "examples_per_second": schedule_examples / max(seconds, 1e-9),
            "adapters_at_once": len(together.members),
        }

    def _write_log(self, member: Member, folder: Path) -> None:
        first = {"max_steps": member.last, "first_step": 0}
        lines = [json.dumps(entry) for entry in [first, *member.log]]
        (folder / LOG_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")

    # ---- one after the other --------------------------------------------------------------------

    def _train_apart(
        self,
        one: Asked,
        arguments: FineTuningArguments,
        untrained: dict[int | None, Untrained],
    ) -> None:
        train, held_out = self.rows.of(one.fold)
        folder = self.root / one.name
        goes_on = self.training.resume_from_checkpoint and any(folder.glob("checkpoint-*"))
        arguments.resume_from_checkpoint = True if goes_on else None  # type: ignore[assignment]
        arguments.overwrite_output_dir = True  # what is left of a session that was killed
        if rank() == 0:
            say(f"\n{one.name}:", flush=True)
        ran = self.train_alone(
            RunAlone(
                one.adapter(self.lora),
                arguments,
                replace(self.data, train=train, held_out=held_out, test=[]),
                untrained.get(one.fold),
                self.rows.test,
            )
        )
        untrained[one.fold] = ran.untrained
        on_first_rank(lambda: self._write_results(folder, ran.comparison, ran.test))

    def _write_results(
        self, folder: Path, comparison: Comparison, test: ModelOutputs | None
    ) -> None:
        if test is not None:
            metrics = evaluation_metrics(self.data.task, self.tokens(self.rows.test), test)
            write_json(folder / _TEST_FILE, metrics)
        comparison.save(folder)  # last: `metrics.json` says that the adapter is finished

    # ---- the end --------------------------------------------------------------------------------

    def _sum_up(self) -> Summary:
        summary = Summary(
            [self._result(one) for one in self.asked],
            primary_metric=self.data.task.primary_metric,
            over="seeds" if self.training.folds is None else "folds",
            chooses=self.chooses,
        )
        summary.save(self.root)
        say(f"\n{summary}", flush=True)
        labels = self.data.task.answer_kind.labels
        if (line := write_label_errors(summary.pooled, labels, self.root)) is not None:
            say(line, flush=True)
        self._report(summary)
        return summary

    def _result(self, one: Asked) -> MemberResult:
        folder = self.root / one.name
        about: dict[str, Any] = {
            "setting": one.setting,
            "values": one.values,
            "seed": one.seed,
            "fold": one.fold,
        }
        if (folder / _STOPPED_FILE).is_file():
            why = str(read_json_object(folder, _STOPPED_FILE)["why"])
            return MemberResult(one.name, **about, stopped=why, metrics={}, predictions=None)
        found = read_run(folder)
        test = read_json_object(folder, _TEST_FILE) if self.rows.test else None
        return MemberResult(
            one.name,
            **about,
            stopped=None,
            metrics=(found.metrics or {})["metrics"],
            predictions=found.predictions,
            test=test,
        )

    def _report(self, summary: Summary) -> None:
        """All adapters side by side; what goes wrong here is said, and costs nothing."""
        folders = [self.root / one.name for one in summary.members if one.stopped is None]
        if len(folders) < 2:
            return
        try:
            say(f"Report: {write_comparison(folders, self.root / REPORT_FILE)}", flush=True)
        except Exception as error:  # the adapters are saved by now
            logger.error("The report could not be written (%s: %s).", type(error).__name__, error)


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


def _model_of(base: StoredBase | WholeBase) -> PreTrainedModel:
    """It, perhaps without its weights."""
    return base.model if isinstance(base, StoredBase) else base.skeleton()
