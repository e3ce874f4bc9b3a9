"""One adapter of a pass: recorded, saved, calibrated, scored and reported on as its own run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lora_fsdp.adapter.probes import build_probes
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.rows import TaskData
from lora_fsdp.data.sampling import ScoringSequences
from lora_fsdp.distributed.status import fsdp_status
from lora_fsdp.evaluation.comparison import Comparison
from lora_fsdp.evaluation.metrics import evaluation_metrics
from lora_fsdp.evaluation.outputs import LOG_FILE, write_atomically
from lora_fsdp.placement.decide import Placement
from lora_fsdp.ranks import on_first_rank
from lora_fsdp.reporting.harness import try_to_write_harness_task
from lora_fsdp.reporting.model_card import try_to_write_card
from lora_fsdp.reporting.recording.outcome import facts_of_training
from lora_fsdp.reporting.recording.record import record_start
from lora_fsdp.reporting.report import try_to_write_report
from lora_fsdp.sweeps.earlier import STAGE_FILE
from lora_fsdp.sweeps.grid import Asked
from lora_fsdp.sweeps.once import Once
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.training.calibrating import calibrate_outputs
from lora_fsdp.training.prepared import longest_answer
from lora_fsdp.training.rivals import compare_run, rows_to_probe, score_base
from lora_fsdp.training.saving.adapter_writer import AdapterWriter
from lora_fsdp.training.saving.atomic_folders import atomic_files
from lora_fsdp.training.saving.state_file import read_state, write_state
from lora_fsdp.training.scorer import RunScorer
from lora_fsdp.training.together.loop import AdaptersTogether
from lora_fsdp.training.together.members import Member


@dataclass(frozen=True)
class MemberRun:
    """What a run of one adapter does beside training, for one of a pass. Every method is a
    collective call.

    It has what `record_start` asks of a trainer.

    Attributes:
        once: what all adapters of the run have in common.
        together: the pass.
        member: the adapter.
    """

    once: Once
    together: AdaptersTogether
    member: Member

    # ---- as a trainer has it --------------------------------------------------------------------

    @property
    def args(self) -> FineTuningArguments:
        """Its run's."""
        return self.member.plan.args

    @property
    def fsdp_settings(self) -> FsdpSettings | None:
        """Of the launch."""
        return self.together.settings

    @property
    def encoder(self) -> Encoder:
        """Of all examples."""
        return self.once.encoder

    @property
    def placement(self) -> Placement:
        """Of the pass."""
        return self.together.placement

    @property
    def max_new_tokens(self) -> int:
        """Of the longest text that is generated."""
        return longest_answer(self.args, self.member.plan.train)

    @property
    def train_dataset(self) -> Sequence[EncodedExample]:
        """What it has learnt."""
        return self.member.plan.train

    @cached_property
    def held_out(self) -> Sequence[EncodedExample]:
        """What it is scored on."""
        return self.once.tokens(self.data.held_out)

    @property
    def test_dataset(self) -> Sequence[EncodedExample]:
        """None: the rows for the test of the best setting are not its own."""
        return ()

    @property
    def examples_per_step(self) -> int:
        """Examples of one optimizer step over all ranks."""
        return self.together.examples_per_step(self.member.plan)

    # ---- what it came to ------------------------------------------------------------------------

    @property
    def asked(self) -> Asked:
        """As it was asked for."""
        return self.once.of(self.member.plan.name)

    @cached_property
    def data(self) -> TaskData:
        """Its rows."""
        return self.once.data_of(self.asked)

    @property
    def folder(self) -> Path:
        """Its own."""
        return self.once.root / self.member.plan.name

    @cached_property
    def scorer(self) -> RunScorer:
        """Of whatever adapter is at work."""
        return RunScorer(
            model=self.together.model,
            packed=self.together.packed,
            encoder=self.once.encoder,
            device=self.together.device,
            autocast=nullcontext,
            max_new_tokens=self.max_new_tokens,
        )

    def record(self) -> None:
        """Write what is known before it is trained."""
        once = self.once
        lora = self.asked.adapter(once.lora)
        asked = {"model": once.model, "adapter": lora, "data": once.data_args}
        status = fsdp_status(self.together.model)
        on_first_rank(
            lambda: record_start(
                self.folder, trainer=self, data=self.data, status=status, asked=asked
            )
        )

    def go_on_from_stage(self) -> None:
        """Go on from where an earlier stage has left the adapter, if there was one."""
        if (self.folder / STAGE_FILE).is_file():
            self.member.put_back(read_state(self.folder / STAGE_FILE))

    def leave_stage(self) -> float:
        """Keep all that its next step depends on; its score on its held-out rows."""

        def write() -> None:
            state = self.member.state()
            write_atomically(self.folder / STAGE_FILE, lambda draft: write_state(draft, state))

        on_first_rank(write)
        with self.together.only(self.member):
            outputs = self.scorer.outputs(self._loader(self.held_out))
        task = self.data.task
        return float(evaluation_metrics(task, self.held_out, outputs)[task.primary_metric])

    def save_and_score(self, seconds: float) -> None:
        """Save the adapter as its own run would, then score it and report on it.

        Args:
            seconds: that training all of the pass took.
        """
        once, test = self.once, None
        with self.together.only(self.member):
            self._save()
            tuned = self.scorer.outputs(self._loader(self.held_out))
            if once.rows.test:
                test = self.scorer.outputs(self._loader(once.tokens(once.rows.test)))
        comparison = self._compare(tuned, seconds)

        def write() -> None:
            self._write_log()
            (self.folder / STAGE_FILE).unlink(missing_ok=True)
            once.write_results(self.asked.name, comparison, test)
            try_to_write_card(self.folder)
            try_to_write_harness_task(self.folder)
            try_to_write_report(self.folder)

        on_first_rank(write)

    def _save(self) -> None:
        examples = [*self.data.train, *self.data.held_out]
        writer = AdapterWriter(
            model=self.together.model,
            args=self.args,
            encoder=self.encoder,
            max_new_tokens=self.max_new_tokens,
            base_fingerprint=self.together.base_fingerprint,
            probes=build_probes(self.encoder, examples),
            packed=self.together.packed,
            autocast=nullcontext,
            adapter=self.member.adapter_name,
        )
        answers = writer.answer_probes()

        def write() -> None:
            facts = self.together.facts | {"member": self.member.plan.name}
            with atomic_files(self.folder, facts, last="adapter_config.json") as partial:
                writer.write(partial, answers, goes_to=self.folder, trained=self.member.moved)

        on_first_rank(write)

    def _compare(self, tuned: ModelOutputs, seconds: float) -> Comparison:
        once, fold = self.once, self.asked.fold
        if (base := once.untrained.get(fold)) is None:
            with self.together.only(None):
                base = score_base(
                    self.scorer,
                    self._loader,
                    learnt=rows_to_probe(once.data.task, self.args, self.train_dataset),
                    reported=self.held_out,
                )
        comparison = compare_run(
            once.data.task,
            train=self.data.train,
            reported=self.held_out,
            untrained=base,
            tuned=tuned,
            calibrated=calibrate_outputs(once.data.task, self.held_out, tuned),
            folder=self.folder,
            facts=self._facts(seconds),
        )
        once.know(fold, base, comparison)
        return comparison

    def _loader(self, examples: Sequence[EncodedExample]) -> DataLoader[Any]:
        sequences = ScoringSequences(
            examples,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            max_tokens=self.placement.sequence_length,
            packing=self.together.packed.packing,
        )
        return DataLoader(sequences, batch_size=1, collate_fn=itemgetter(0))

    def _facts(self, seconds: float) -> dict[str, Any]:
        """As a run by itself writes them; the seconds are of all adapters of the pass."""
        member = self.member
        seen = member.step * (len(self.data.train) / max(1, len(member.steps)))
        facts = facts_of_training(self, self.data, steps=member.step, seen=seen, seconds=seconds)
        return facts | {"adapters_at_once": len(self.together.members)}

    def _write_log(self) -> None:
        first = {"max_steps": self.member.last, "first_step": 0}
        lines = [json.dumps(entry) for entry in [first, *self.member.log]]
        (self.folder / LOG_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
