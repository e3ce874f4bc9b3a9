"""`finetune`: the whole story on one screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import LoraConfig
from transformers import set_seed

from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.arguments.inputs import inputs_of_run
from lora_fsdp.base.loading import load_tokenizer
from lora_fsdp.base.reading.ahead import read_ahead_once
from lora_fsdp.base.streaming import OpenBase, open_base
from lora_fsdp.claiming import claimed, claimed_for_several, remove_earlier_run
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.formats.several import input_paths
from lora_fsdp.data.rows import TaskData, encoder_of, load_task_data, settled_rows
from lora_fsdp.distributed.hosts import compare_hosts
from lora_fsdp.distributed.lost_hosts import watch_hosts
from lora_fsdp.distributed.status import fsdp_status
from lora_fsdp.evaluation.comparison import Comparison, generated_texts
from lora_fsdp.planning.predicted import beside_measured
from lora_fsdp.printing import say
from lora_fsdp.ranks import on_first_of_hosts, on_first_rank
from lora_fsdp.reporting.harness import try_to_write_harness_task
from lora_fsdp.reporting.model_card import WriteCards, try_to_write_card
from lora_fsdp.reporting.recording.announcing import announce
from lora_fsdp.reporting.recording.outcome import facts_of_run
from lora_fsdp.reporting.recording.record import record_start
from lora_fsdp.reporting.report import try_to_write_report
from lora_fsdp.sweeps.checking import check_several
from lora_fsdp.sweeps.grid import is_several
from lora_fsdp.sweeps.once import Once
from lora_fsdp.sweeps.outcome.summary import Summary
from lora_fsdp.sweeps.run import Several
from lora_fsdp.sweeps.turns import RanAlone, RunAlone, StopAtShare, TrainAlone
from lora_fsdp.tasks import Task
from lora_fsdp.training.calibrating import calibrate, decide
from lora_fsdp.training.few_shot import rows_with_shots
from lora_fsdp.training.logging.log_history import KeepLog
from lora_fsdp.training.logging.time_spent import measured, seconds_by_part, spent_on
from lora_fsdp.training.rivals import Untrained, compare_run, score_untrained
from lora_fsdp.training.saving.pushing import try_to_push
from lora_fsdp.training.trainer import LoraTrainer


@dataclass(frozen=True)
class FineTuningResult:
    """What a run leaves behind.

    Attributes:
        output_dir: the adapter's folder, with the tokenizer, `metrics.json`, `predictions.csv`,
            `confusion_matrix.png`, `report.html` and the model card `README.md`.
        comparison: the tuned model's metrics beside those of the untrained model and the baselines,
            on the held-out rows; the same on every rank. `None` where there are several adapters.
        task: as its table settled it.
        summary: of several adapters (`--seeds`, `--folds`, `--grid`), each of which has a folder in
            `output_dir`; `None` where there is one.
    """

    output_dir: Path
    comparison: Comparison | None
    task: Task
    summary: Summary | None = None


def finetune(
    *,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
    training_args: FineTuningArguments,
    task: Task | None = None,
) -> FineTuningResult:
    """Train an adapter for a task, or several, prove it, and compare it with what it should beat.

    Called by every process of a launch. `task` stands in for `data_args.task`.
    """
    run = _Run(model_args, lora_args, data_args, training_args)
    with measured():
        return _finetune(run, task)


def _finetune(run: _Run, task: Task | None) -> FineTuningResult:
    watch_hosts()
    compare_hosts(run.inputs)
    read_ahead_once(run.model.model_name_or_path, revision=run.model.model_revision)
    if is_several(run.training):
        return _finetune_several(run, task)
    with claimed(run.training, inputs=run.input_paths) as output_dir:
        with spent_on("read"):
            data = _load_data(run, task, choosing=run.training.chooses_checkpoint)
        return FineTuningResult(output_dir, _run_one(run, data).comparison, data.task)


class _Run(NamedTuple):
    """The arguments of a run."""

    model: ModelArguments
    lora: LoraArguments
    data: DataArguments
    training: FineTuningArguments

    @property
    def inputs(self) -> dict[str, str | None]:
        """What it reads, by the option that names it."""
        return inputs_of_run(self.model, self.lora, self.data)

    @property
    def input_paths(self) -> list[Path]:
        """The files and folders that it reads."""
        return [path for name in self.inputs.values() if name for path in input_paths(name)]


def _load_data(run: _Run, task: Task | None, *, choosing: bool) -> TaskData:
    data = load_task_data(run.data, seed=run.training.seed, task=task, choosing=choosing)
    seed = int(run.training.seed)
    return settled_rows(run.data, data, lambda: load_tokenizer(run.model), seed=seed)


def _finetune_several(run: _Run, task: Task | None) -> FineTuningResult:
    """Train several adapters, each into a folder of its own in the output folder."""
    check_several(run.training, run.data, run.lora)
    with claimed_for_several(run.training, inputs=run.input_paths) as output_dir:
        once = Once(
            model=run.model,
            lora=run.lora,
            data_args=run.data,
            training=run.training,
            data=_load_data(run, task, choosing=False),
            tokenizer=load_tokenizer(run.model),
        )
        alone = TrainAlone(partial(_run_alone, run), partial(_run_to_share, run))
        summary = Several(once, alone).run()
        return FineTuningResult(output_dir, None, once.data.task, summary)


def _run_alone(run: _Run, alone: RunAlone) -> RanAlone:
    """One adapter of several by itself."""
    own = run._replace(lora=alone.lora, training=alone.training)
    with claimed(alone.training), measured():
        return _run_one(own, alone.data, alone)


def _run_to_share(run: _Run, alone: RunAlone, share: float) -> float:
    """One adapter of several up to a share of its steps, with a checkpoint there: its score."""
    own = run._replace(lora=alone.lora, training=alone.training)
    with claimed(alone.training):
        trainer, base, _ = _begin(own, alone.data, alone)
        stop = StopAtShare(trainer, share)
        if (known := on_first_rank(stop.known)) is None:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
            known = stop.score
        alone.base.give_back(trainer, base)
        return float(cast(float, known))


def _run_one(run: _Run, data: TaskData, alone: RunAlone | None = None) -> RanAlone:
    """Train, save and score one adapter.

    Args:
        run: its arguments.
        data: its examples.
        alone: as one of several: what is known already, and what else is asked.
    """
    shown = []
    if count := run.training.untrained_shots:
        encoder = encoder_of(run.data, load_tokenizer(run.model), task=data.task)
        shown = rows_with_shots(encoder, data, count=count, seed=int(run.training.seed))
    trainer, base, log = _begin(run, data, alone)
    output_dir = Path(run.training.output_dir or ".")
    ran = _train_and_compare(trainer, data, log, alone, with_shots=shown)
    if trainer.is_world_process_zero():
        with spent_on("report"):
            ran.comparison.save(output_dir)
            try_to_write_card(output_dir)
            try_to_write_harness_task(output_dir)
            comparison = f"\n{ran.comparison}\n"
            say(f"{comparison}\nAdapter, metrics and predictions: {output_dir}", flush=True)
            if (page := try_to_write_report(output_dir)) is not None:
                say(f"Report: {page}", flush=True)
        ran.comparison.save_facts(output_dir, seconds_by_part=seconds_by_part())
        if parts := ran.comparison.facts.get("plan", {}).get("seconds_by_part"):
            say(beside_measured(parts, seconds_by_part()), flush=True)
        if trainer.args.push_to_hub:
            _push(trainer, output_dir)
    trainer.accelerator.wait_for_everyone()
    if alone is not None:
        alone.base.give_back(trainer, base)
    return ran


def _push(trainer: LoraTrainer, folder: Path) -> None:
    repository = str(trainer.hub_model_id)
    if (address := try_to_push(folder, repository, trainer.args)) is not None:
        say(f"Pushed: {address}", flush=True)


def _begin(
    run: _Run, data: TaskData, alone: RunAlone | None
) -> tuple[LoraTrainer, OpenBase, KeepLog]:
    """Make the trainer, say what is about to happen, and write that down."""
    training_args, output_dir = run.training, Path(run.training.output_dir or ".")
    set_seed(training_args.seed)  # the adapter's first values
    log = KeepLog(output_dir)
    adapter = lora_config(run.lora, revision=run.model.model_revision)
    with spent_on("read"):
        base: OpenBase = (
            open_base(run.model, device=training_args.device, peft_config=adapter)
            if alone is None
            else alone.base.take(adapter)
        )
        trainer = _trainer(run, data, base, adapter, alone, log)
    status = fsdp_status(trainer.model, traffic=trainer.host_traffic)
    # Only now: an earlier run outlives every mistake that is found before this one can start.
    on_these = on_first_of_hosts if training_args.save_on_each_node else on_first_rank
    on_these(lambda: remove_earlier_run(output_dir, training_args))
    if trainer.is_world_process_zero():
        with spent_on("report"):
            announce(trainer, data, status)
            named = {"model": run.model, "adapter": run.lora, "data": run.data}
            record_start(output_dir, trainer=trainer, data=data, status=status, asked=named)
    return trainer, base, log


def _trainer(
    run: _Run,
    data: TaskData,
    base: OpenBase,
    adapter: LoraConfig,
    alone: RunAlone | None,
    log: KeepLog,
) -> LoraTrainer:
    """The trainer, with base and adapter in place."""
    tokens = (lambda examples: examples) if alone is None else alone.tokens
    return LoraTrainer(
        model=base,
        args=run.training,
        task=data.task,
        processing_class=load_tokenizer(run.model),
        train_dataset=tokens(data.train),
        eval_dataset=tokens(data.held_out),
        test_dataset=tokens(data.test),
        peft_config=adapter,
        adapter_name_or_path=run.lora.adapter_name_or_path,
        max_length=run.data.max_length,
        chat_template=run.data.chat_template,
        chat_template_kwargs=run.data.template_kwargs(),
        thinking=run.data.thinking,
        shots=data.shots,
        callbacks=[log, WriteCards(Path(run.training.output_dir or "."))],
    )


def _train_and_compare(
    trainer: LoraTrainer,
    data: TaskData,
    log: KeepLog,
    alone: RunAlone | None,
    *,
    with_shots: Sequence[EncodedExample],
) -> RanAlone:
    reported = trainer.test_dataset or trainer.held_out
    with spent_on("score"):
        untrained = None if alone is None else alone.untrained
        if untrained is None:
            # Loaders draw numbers, too: dropout is to be the same where these are known already.
            with torch.random.fork_rng(devices=()):
                untrained = score_untrained(trainer, reported, with_shots=with_shots)
        with trainer.model.disable_adapter():
            base_texts = _sampled_texts(trainer)
    with spent_on("train"):
        trained = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    # At once: what follows takes minutes, in which a process can be killed. It is pushed at the
    # end, with its card and scores.
    trainer.save_model(_internal_call=True)
    if trainer.is_world_process_zero():
        with spent_on("report"):
            try_to_write_card(Path(str(trainer.args.output_dir)), measured=False)
    with spent_on("score"):
        return _compared(
            trainer, data, log, trained.metrics, alone, untrained=untrained, texts=base_texts
        )


def _compared(
    trainer: LoraTrainer,
    data: TaskData,
    log: KeepLog,
    trained: dict[str, float],
    alone: RunAlone | None,
    *,
    untrained: Untrained,
    texts: list[str],
) -> RanAlone:
    """The tuned model's scores beside all others; `texts` are the untrained one's own."""
    reported = trainer.test_dataset or trainer.held_out
    tuned = trainer.outputs(reported)
    tuned_texts = _sampled_texts(trainer)
    comparison = compare_run(
        data.task,
        train=data.train,
        reported=reported,
        untrained=untrained,
        tuned=tuned,
        calibrated=calibrate(trainer, reported, tuned),
        decided=decide(trainer),
        folder=Path(str(trainer.args.output_dir)),
        facts=facts_of_run(trainer, data, trained, first_step=log.first_step),
        written=generated_texts(data.task, data.reported, base=texts, tuned=tuned_texts),
    )
    asked = alone.tokens(alone.test) if alone is not None else []
    return RanAlone(comparison, untrained, trainer.outputs(asked) if asked else None)


def _sampled_texts(trainer: LoraTrainer) -> list[str]:
    """What the model generates freely for the first of the reported rows."""
    first = (trainer.test_dataset or trainer.held_out)[: trainer.args.generate_examples]
    return trainer.scorer.sample(first, temperature=trainer.args.temperature)
