"""`finetune`: the whole story on one screen."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from transformers import set_seed

from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.adapter.targets import targets_in_words
from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.arguments.option import check_is_text
from lora_fsdp.base.loading import load_tokenizer
from lora_fsdp.base.streaming import open_base
from lora_fsdp.data.checking import check_task_data
from lora_fsdp.data.encoding import EncodedExample
from lora_fsdp.data.few_shot import check_room, check_shots, draw_shots
from lora_fsdp.data.formats.several import input_paths
from lora_fsdp.data.rows import TaskData, encoder_of, load_task_data, settled_rows
from lora_fsdp.distributed.hosts import compare_hosts
from lora_fsdp.distributed.orphans import end_with_launcher
from lora_fsdp.distributed.sharding import release_gathered
from lora_fsdp.distributed.status import FsdpStatus, fsdp_status
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.comparison import Comparison, compare, generated_texts
from lora_fsdp.evaluation.generation import generate_texts
from lora_fsdp.evaluation.untrained import AS_TRAINED
from lora_fsdp.placement.gpus import known_gpu
from lora_fsdp.planning.predicted import predicted
from lora_fsdp.printing import say, visible
from lora_fsdp.ranks import on_first_of_hosts, on_first_rank
from lora_fsdp.reporting.model_card import WriteCards, remove_model_card, try_to_write_card
from lora_fsdp.reporting.recording.record import record_start
from lora_fsdp.reporting.report import try_to_write_report
from lora_fsdp.reporting.run_files import RECORD_FILES
from lora_fsdp.sweeps.checking import check_several
from lora_fsdp.sweeps.earlier import earlier_files
from lora_fsdp.sweeps.grid import is_several
from lora_fsdp.sweeps.kept_base import OpenBase
from lora_fsdp.sweeps.once import Once
from lora_fsdp.sweeps.outcome.summary import Summary
from lora_fsdp.sweeps.run import Several
from lora_fsdp.sweeps.turns import RanAlone, RunAlone, StopAtShare, TrainAlone
from lora_fsdp.tasks import Task
from lora_fsdp.training.calibrating import calibrate, decide, save_calibration, save_decided
from lora_fsdp.training.logging.log_history import KeepLog
from lora_fsdp.training.logging.time_spent import measured, seconds_by_part, spent_on
from lora_fsdp.training.rivals import Untrained, rows_to_probe, score_untrained
from lora_fsdp.training.saving.atomic_folders import remove_leftovers, writing_into
from lora_fsdp.training.saving.output_folder import (
    check_inputs_stay,
    check_kind,
    check_output_folder,
    files_of,
)
from lora_fsdp.training.saving.run_lock import hold_folder, release_folder
from lora_fsdp.training.saving.separate_disks import agree_on_resume
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
    model_args, lora_args, data_args, training_args = run
    compare_hosts(_inputs(model_args, data_args, lora_args))
    if is_several(training_args):
        return _finetune_several(run, task)
    output_dir = claim_output_folder(training_args, inputs=_input_paths(run))
    with ExitStack() as held:
        held.callback(release_folder, output_dir)
        held.enter_context(writing_into(output_dir))
        with spent_on("read"):
            data = _load_data(run, task, choosing=training_args.chooses_checkpoint)
        return FineTuningResult(output_dir, _run_one(run, data).comparison, data.task)


class _Run(NamedTuple):
    """The arguments of a run."""

    model: ModelArguments
    lora: LoraArguments
    data: DataArguments
    training: FineTuningArguments


def _load_data(run: _Run, task: Task | None, *, choosing: bool) -> TaskData:
    data = load_task_data(run.data, seed=run.training.seed, task=task, choosing=choosing)
    seed = int(run.training.seed)
    return settled_rows(run.data, data, lambda: load_tokenizer(run.model), seed=seed)


def _finetune_several(run: _Run, task: Task | None) -> FineTuningResult:
    """Train several adapters, each into a folder of its own in the output folder."""
    check_several(run.training, run.data, run.lora)
    if run.lora.adapter_name_or_path is not None:
        raise ArgumentError(
            "--adapter_name_or_path goes on with one adapter, and several are to be trained: leave "
            "it out, or start a run for each."
        )
    output_dir = Path(run.training.output_dir or ".")
    end_with_launcher()
    on_first_rank(lambda: claim_for_several(output_dir, run.training, inputs=_input_paths(run)))
    with ExitStack() as held:
        held.callback(release_folder, output_dir)
        held.enter_context(writing_into(output_dir))
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
    folder = claim_output_folder(alone.training)
    try:
        with measured():
            return _run_one(own, alone.data, alone)
    finally:
        release_folder(folder)


def _run_to_share(run: _Run, alone: RunAlone, share: float) -> float:
    """One adapter of several up to a share of its steps, with a checkpoint there: its score."""
    own = run._replace(lora=alone.lora, training=alone.training)
    folder = claim_output_folder(alone.training)
    try:
        trainer, base, _ = _begin(own, alone.data, alone)
        stop = StopAtShare(trainer, share)
        if (known := on_first_rank(stop.known)) is None:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
            known = stop.score
        alone.base.give_back(trainer, base)
        return float(cast(float, known))
    finally:
        release_folder(folder)


def _run_one(run: _Run, data: TaskData, alone: RunAlone | None = None) -> RanAlone:
    """Train, save and score one adapter.

    Args:
        run: its arguments.
        data: its examples.
        alone: as one of several: what is known already, and what else is asked.
    """
    shown = _with_shots(run, data)
    trainer, base, log = _begin(run, data, alone)
    output_dir = Path(run.training.output_dir or ".")
    ran = _train_and_compare(trainer, data, log, alone, with_shots=shown)
    if trainer.is_world_process_zero():
        with spent_on("report"):
            ran.comparison.save(output_dir)
            try_to_write_card(output_dir)
            comparison = f"\n{ran.comparison}\n"
            say(f"{comparison}\nAdapter, metrics and predictions: {output_dir}", flush=True)
            if (page := try_to_write_report(output_dir)) is not None:
                say(f"Report: {page}", flush=True)
        ran.comparison.save_facts(output_dir, seconds_by_part=seconds_by_part())
    trainer.accelerator.wait_for_everyone()
    if alone is not None:
        alone.base.give_back(trainer, base)
    return ran


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
    on_these(lambda: _remove_earlier_run(output_dir, training_args))
    if trainer.is_world_process_zero():
        with spent_on("report"):
            _announce(trainer, data, status)
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


def _with_shots(run: _Run, data: TaskData) -> list[EncodedExample]:
    """The reported rows with `--untrained_shots` in their prompts; none where not asked for."""
    if not run.training.untrained_shots:
        return []
    if data.shots:
        raise ArgumentError(
            "--few_shot shows examples to the untrained model as well, so it is that rival: leave "
            "out --untrained_shots."
        )
    check_shots(data.task, [*data.train, *data.scored])
    encoder = encoder_of(run.data, load_tokenizer(run.model), task=data.task)
    shots = draw_shots(
        encoder,
        data.train,
        count=run.training.untrained_shots,
        besides=data.scored,
        seed=int(run.training.seed),
        option="untrained_shots",
    )
    shows = encoder.showing(shots)
    asked = shows.encode(data.reported)
    check_room(shows, asked, option="untrained_shots")
    return asked


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
            base_texts = _generate_freely(trainer, reported)
    with spent_on("train"):
        trained = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()  # at once: what follows takes minutes, in which a process can be killed
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
    tuned_texts = _generate_freely(trainer, reported)
    calibrated = calibrate(trainer, reported, tuned)
    if (calibration := calibrated.calibration) is not None:
        folder = Path(str(trainer.args.output_dir))
        on_first_rank(lambda: save_calibration(calibration, folder))
    decided = decide(trainer)
    if (task := decided.task) is not None:
        on_first_rank(lambda: save_decided(task, Path(str(trainer.args.output_dir))))
    comparison = compare(
        data.task,
        train=data.train,
        held_out=reported,
        untrained=untrained.ways[AS_TRAINED],
        ways=untrained.ways,
        rivals=untrained.answers,
        tuned=tuned,
        calibrated=calibrated.outputs,
        decided=decided.task,
        written=generated_texts(data.task, data.reported, base=texts, tuned=tuned_texts),
        facts={
            **_facts(trainer, data, trained, first_step=log.first_step),
            **untrained.facts,
            **calibrated.facts,
            **decided.facts,
        },
    )
    asked = alone.tokens(alone.test) if alone is not None else []
    return RanAlone(comparison, untrained, trainer.outputs(asked) if asked else None)


def claim_output_folder(arguments: FineTuningArguments, *, inputs: Sequence[Path] = ()) -> Path:
    """The output folder, held by rank 0; of an earlier run nothing is removed yet.

    Args:
        arguments: the run's.
        inputs: files and folders that the run reads.

    Raises:
        OutputFolderError: it holds a run, and neither resuming nor overwriting was asked for; or
            overwriting would remove what the run reads; or another run is writing into it.
        DamagedCheckpointError: it is to be resumed and holds no complete checkpoint.
    """
    folder = Path(arguments.output_dir or ".")
    end_with_launcher()
    each = bool(arguments.save_on_each_node)
    resume = agree_on_resume(folder, arguments.resume_from_checkpoint, on_each_host=each)
    arguments.resume_from_checkpoint = resume  # type: ignore[assignment]
    on_first_rank(lambda: _claim(folder, arguments, inputs))
    if each:
        on_first_of_hosts(lambda: check_output_folder(folder, arguments))
    return folder


def claim_for_several(
    folder: Path, arguments: FineTuningArguments, *, inputs: Sequence[Path]
) -> None:
    """Hold the output folder of several adapters; for one rank to call.

    Raises:
        OutputFolderError: as `claim_output_folder`.
    """
    hold_folder(folder)
    try:
        remove_leftovers(folder)
        alone = copy(arguments)
        alone.resume_from_checkpoint = None
        earlier = earlier_files(folder)
        if not arguments.resume_from_checkpoint:
            replaced = [*check_output_folder(folder, alone), *earlier]
            check_inputs_stay(inputs, replaced)
            for path in dict.fromkeys(replaced):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except BaseException:
        release_folder(folder)
        raise


def _inputs(
    model: ModelArguments, data: DataArguments, lora: LoraArguments
) -> dict[str, str | None]:
    """What a run reads, by the option that names it."""
    given = {
        "model_name_or_path": model.model_name_or_path,
        "data_file": data.data_file,
        "eval_file": data.eval_file,
        "test_file": data.test_file,
        "task_file": data.task_file,
        "adapter_name_or_path": lora.adapter_name_or_path,
    }
    for name, value in given.items():
        check_is_text(name, value)
    return given


def _input_paths(run: _Run) -> list[Path]:
    named = _inputs(run.model, run.data, run.lora).values()
    return [path for name in named if name for path in input_paths(name)]


def _claim(folder: Path, arguments: FineTuningArguments, inputs: Sequence[Path]) -> None:
    hold_folder(folder)
    try:
        # What a process killed while writing leaves behind is nothing that could be lost.
        remove_leftovers(folder)
        replaced = check_output_folder(folder, arguments)
        check_inputs_stay(inputs, replaced)
        for path in files_of(folder, RECORD_FILES):
            check_kind(path, is_folder=False)
    except BaseException:
        release_folder(folder)
        raise


def _remove_earlier_run(folder: Path, arguments: FineTuningArguments) -> None:
    """Remove what the new run replaces, if it does not go on with it."""
    replaced = check_output_folder(folder, arguments)
    if arguments.resume_from_checkpoint:
        return
    for path in [*replaced, *files_of(folder, RECORD_FILES)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    remove_model_card(folder)


def _announce(trainer: LoraTrainer, data: TaskData, status: FsdpStatus) -> None:
    """Say what is about to happen, before it costs anything."""
    answers = data.task.answer_kind.announcement(max_new_tokens=trainer.max_new_tokens)
    test = f", {len(data.test)} for the test" if data.test else ""
    rows = f"{len(data.train)} training rows, {len(data.held_out)} held out{test}"
    say(f"Task {data.task.name}: {rows}")
    for line in data.splits:
        say(f"  {visible(line, lines=False)}")
    say(f"  answers: {visible(answers, lines=False)}")
    if (chat := trainer.encoder.chat) is not None and chat.announcement:
        say(f"  answers stand {visible(chat.announcement, lines=False)}")
    if data.shots:
        numbers = ", ".join(str(shot.row) for shot in data.shots)
        say(f"  every prompt shows these rows, which are not trained on (--few_shot): {numbers}")
    if data.dropped:
        say(f"  rows left out as unusable: {data.dropped}")
    say(f"  rows whose text was shortened to fit: {trainer.shortened}")
    encoded = [*trainer.train_dataset, *trainer.held_out, *trainer.test_dataset]
    for warning in check_task_data(data, encoded).warnings:
        say(f"  warning: {visible(warning, lines=False)}")
    shared = "yes" if trainer.share_prefix else "no"
    say(f"  prompts' common prefix computed once a packed sequence: {shared}")
    say(f"  {targets_in_words(trainer.model)}")
    say(str(status))
    say(str(trainer.placement))
    which = "test" if data.test else "held-out"
    what = f"Scoring the untrained model on {len(data.reported)} {which} rows"
    probed = len(rows_to_probe(trainer.task, trainer.args, trainer.train_dataset))
    also = f" and {probed} training rows (--probe_rows)" if probed else ""
    say(f"{what}{also}, then training.", flush=True)


def _generate_freely(trainer: LoraTrainer, examples: Sequence[EncodedExample]) -> list[str]:
    """The text that the model generates freely for the first of `examples`."""
    args = trainer.args
    chosen = examples[: args.generate_examples]
    texts = generate_texts(
        trainer.model,
        trainer.processing_class,
        [example.prompt_ids for example in chosen],
        device=args.device,
        max_new_tokens=trainer.max_new_tokens,
        temperature=args.temperature,
        end_token_id=trainer.encoder.end_token_id,
        packing=trainer.packed.packing_of_prompts,
    )
    release_gathered(trainer.model)
    return texts


def _facts(
    trainer: LoraTrainer, data: TaskData, trained: dict[str, float], *, first_step: int
) -> dict[str, Any]:
    steps = trainer.state.global_step
    tokens = [len(one.prompt_ids) + len(one.target_ids) for one in trainer.train_dataset]
    # Counted here: not every version of the Trainer leaves out what a resumed run did before.
    seen = trainer.schedule.examples_before(steps) - trainer.schedule.examples_before(first_step)
    speed = seen / max(trained["train_runtime"], 1e-9)
    facts: dict[str, Any] = {
        "seconds_by_part": seconds_by_part(),  # of the last ones more follow: `save_facts`
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": data.task.name,
        "labels": list(data.task.answer_kind.labels),
        "training_rows": len(data.train),
        "held_out_rows": len(data.reported),
        "validation_rows": len(data.held_out) if data.test else None,
        "chosen_among": _chosen_among(trainer) if not data.test else None,
        "rows_left_out": data.dropped,
        "rows_shortened": trainer.shortened,
        "processes": trainer.args.world_size,
        "steps": steps,
        "first_step": first_step,
        "training_seconds": trained["train_runtime"],
        "examples_per_second": speed,
        "tokens_per_second": speed * sum(tokens) / len(tokens),
        "confusion_matrices": {
            step: matrix.to_dict(orient="split")
            for step, matrix in trainer.confusion_matrices.items()
        },
    }
    return facts | _predicted_and_measured(trainer, trained["train_runtime"])


def _chosen_among(trainer: LoraTrainer) -> int | None:
    """Among how many checkpoints the reported one is the best, if it was chosen."""
    if not trainer.args.chooses_checkpoint:
        return None
    metric = str(trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    return sum(f"eval_{metric}" in entry for entry in trainer.state.log_history)


def _predicted_and_measured(trainer: LoraTrainer, seconds: float) -> dict[str, Any]:
    """Memory and cost beside what was predicted; a collective call."""
    on_gpus = trainer.args.device.type == "cuda"
    paid = trainer.args.world_size if on_gpus else 1
    facts: dict[str, Any] = {}
    if on_gpus:
        peaks = gather_object([round(torch.cuda.max_memory_allocated() / 1e9, 3)])
        facts |= {"peak_memory_gb": max(peaks), "peak_memory_gb_of_ranks": peaks}
        device = torch.cuda.get_device_properties(trainer.args.device)
        gpu = known_gpu(device.name, memory=device.total_memory)
        facts["plan"] = predicted(trainer.placement, trainer.work, gpu)
    if (price := trainer.args.price_per_hour) is not None:
        facts["cost"] = price * paid * seconds / 3600
        if "training_seconds" in facts.get("plan", {}):
            facts["plan"]["cost"] = price * paid * facts["plan"]["training_seconds"] / 3600
    return facts
