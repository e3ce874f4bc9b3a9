"""How good are adapters, by how they are trained, and is it worth it? Macro-F1 over several seeds.

    python -m benchmarks.quality --list
    python -m benchmarks.quality --device cuda --seeds 5 --minutes 8.5
    python -m benchmarks.quality --device cpu --rows 100 --held_out 200 --seeds 3 \
        --arms default all-linear-2-epochs

Airline tweets and SmolLM2-135M, as `make sentiment` brings them, unless others are named. A seed
draws the rows, the adapter's first values and the order; all arms of a seed have the same training
and the same held-out rows. Every arm's result is written as it ends, and what the file has already
is not run again: a call that was cut short goes on. Prints mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import set_seed

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    LoraTrainer,
    ModelArguments,
)
from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.base.loading import load_base, load_tokenizer
from lora_fsdp.base.streaming import open_base
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.rows import TaskData, encoder_of, load_task_data, settled_rows
from lora_fsdp.evaluation.baselines import BASELINES
from lora_fsdp.evaluation.metrics import answers_of, evaluation_metrics, model_outputs
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.evaluation.scoring import score_examples
from lora_fsdp.evaluation.untrained import best_way
from lora_fsdp.tasks.answers.kind import MAJORITY, TFIDF
from lora_fsdp.training.rivals import score_untrained

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / ".cache" / "default"
METRICS = ("macro_f1", "accuracy")
ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["all-linear"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        training, lora, data: arguments by name that differ from those of `DEFAULTS`.
        with_trl: by TRL's SFTTrainer instead.
        ratio: LoRA+'s, of B's learning rate to A's; `None` = one rate for both.
    """

    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    with_trl: bool = False
    ratio: float | None = None


class WithLoraPlus(LoraTrainer):
    """Two learning rates, as PEFT's LoRA+ has them (Hayou et al., arXiv 2402.12354)."""

    ratio: float = 1.0

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """PEFT's, which the Trainer then takes."""
        if self.optimizer is None:
            self.optimizer = create_loraplus_optimizer(
                self.model,
                torch.optim.AdamW,
                lr=self.args.learning_rate,
                loraplus_lr_ratio=self.ratio,
            )
        return super().create_optimizer(model)


def _arm(
    rate: float,
    epochs: float,
    targets: Sequence[str] = LINEAR,
    *,
    with_trl: bool = False,
    ratio: float | None = None,
    lora: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **training: Any,
) -> Arm:
    own = {"learning_rate": rate, "num_train_epochs": epochs, **training}
    adapter = {"lora_target_modules": list(targets), **(lora or {})}
    return Arm(own, adapter, data or {}, with_trl, ratio)


ARMS: dict[str, Arm] = {
    "default": _arm(2e-3, 1, ATTENTION),
    "qv-2-epochs": _arm(2e-3, 2, ATTENTION),
    "qv-3-epochs": _arm(1e-3, 3, ATTENTION),
    "all-linear-1-epoch": _arm(1e-3, 1),
    "all-linear-2-epochs": _arm(1e-3, 2),
    "all-linear-3-epochs": _arm(1e-3, 3),
    "all-linear-5e-4": _arm(5e-4, 2),
    "all-linear-2e-3": _arm(2e-3, 2),
    "rank-4": _arm(1e-3, 2, lora={"lora_r": 4}),
    "rank-32": _arm(1e-3, 2, lora={"lora_r": 32}),
    "rank-32-rslora": _arm(5e-4, 2, lora={"lora_r": 32, "lora_kwargs": {"use_rslora": True}}),
    "lora-plus": _arm(5e-4, 2, ratio=8.0),
    "class-weights": _arm(1e-3, 2, data={"class_weights": ["balanced"]}),
    "smoothing": _arm(1e-3, 2, label_smoothing_factor=0.1),
    "focal": _arm(1e-3, 2, focal_gamma=2.0),
    "few-shot": _arm(1e-3, 2, data={"few_shot": 3}),
    "batch-4": _arm(1e-3, 2, per_device_train_batch_size=4),
    "batch-16": _arm(1e-3, 2, per_device_train_batch_size=16),
    "trl-qv-2e-3": _arm(2e-3, 1, ATTENTION, with_trl=True),
    "trl-all-linear-2-epochs": _arm(1e-3, 2, with_trl=True),
}  # fmt: skip
#: What nothing is trained for, all found by one pass.
RIVALS = "rivals"
_UNTRAINED = "untrained, best way"
DEFAULTS = {"per_device_train_batch_size": 8, "lr_scheduler_type": "linear", "warmup_steps": 5}


@dataclass(frozen=True)
class Setting:
    """What all arms of a call have in common.

    Attributes:
        model, table: the base's folder and the rows.
        task: its name.
        rows, held_out: how many to train on and to look at.
        device: cpu or cuda.
        max_steps: of each run, for a rehearsal; `None` = all.
    """

    model: str
    table: str
    task: str
    rows: int
    held_out: int
    device: str
    max_steps: int | None = None

    def key(self) -> dict[str, Any]:
        """What a result must have been found with to be taken for this call's."""
        names = ("task", "rows", "held_out", "device", "max_steps")
        kept = {name: getattr(self, name) for name in names}
        return {**kept, "model": Path(self.model).name, "table": Path(self.table).name}


class Seed:
    """Rows, tokens and rivals of one seed.

    Args:
        setting: of the call.
        number: the seed.
    """

    def __init__(self, setting: Setting, number: int) -> None:
        self.setting, self.number = setting, number
        self.named = ModelArguments(setting.model)
        self.tokenizer = load_tokenizer(self.named)

    def arguments(self, **more: Any) -> DataArguments:
        """Of the rows."""
        setting = self.setting
        return DataArguments(
            task=setting.task,
            data_file=setting.table,
            max_rows=setting.rows + setting.held_out,
            eval_size=setting.held_out,
            **more,
        )

    @cached_property
    def data(self) -> TaskData:
        """The rows that every arm has."""
        return load_task_data(self.arguments(), seed=self.number)

    def trainer(self, arm: Arm, folder: str) -> LoraTrainer:
        """Of this library."""
        arguments = self.arguments(**arm.data)
        data = load_task_data(arguments, seed=self.number) if arm.data else self.data
        data = settled_rows(arguments, data, lambda: self.tokenizer, seed=self.number)
        training = self.training(arm, folder)
        set_seed(self.number)
        adapter = lora_config(LoraArguments(**arm.lora))
        kind = LoraTrainer if arm.ratio is None else WithLoraPlus
        trainer = kind(
            model=open_base(self.named, device=training.device, peft_config=adapter),
            args=training,
            task=data.task,
            processing_class=self.tokenizer,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            peft_config=adapter,
            max_length=arguments.max_length,
            shots=data.shots,
        )
        if isinstance(trainer, WithLoraPlus):
            trainer.ratio = float(arm.ratio or 1.0)
        return trainer

    def training(self, arm: Arm, folder: str) -> FineTuningArguments:
        """The arguments of a run."""
        return FineTuningArguments(output_dir=folder, **self._settings(arm))

    def _settings(self, arm: Arm) -> dict[str, Any]:
        setting = self.setting
        steps = {"max_steps": setting.max_steps} if setting.max_steps else {}
        quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        on = {"use_cpu": setting.device == "cpu", "seed": self.number}
        return {**DEFAULTS, **quiet, **on, **arm.training, **steps}

    # ---- what is measured -----------------------------------------------------------------------

    def ours(self, arm: Arm) -> dict[str, Any]:
        """An arm of this library."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(arm, folder)
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
            outputs = trainer.outputs()
            found = evaluation_metrics(self.data.task, trainer.held_out, outputs)
            return _result(found, seconds=seconds, steps=int(trainer.state.global_step))

    def trl(self, arm: Arm) -> dict[str, Any]:
        """TRL's SFTTrainer with the same adapter, on the same rows, scored as ours are."""
        from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

        setting, data = self.setting, self.data
        device = torch.device(setting.device)
        with tempfile.TemporaryDirectory() as folder:
            set_seed(self.number)
            trainer = SFTTrainer(
                load_base(self.named, device=device),
                SFTConfig(
                    output_dir=folder, report_to=[], max_length=512, bf16=False,
                    **self._settings(arm),
                ),
                train_dataset=data.task.to_prompt_completion(data.train),
                processing_class=self.tokenizer,
                peft_config=lora_config(LoraArguments(**arm.lora)),
            )  # fmt: skip
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
            encoder = encoder_of(self.arguments(), self.tokenizer, task=data.task)
            found = _scored(trainer.model, encoder, data, device=device)
            return _result(found, seconds=seconds, steps=int(trainer.state.global_step))

    def rivals(self) -> dict[str, dict[str, Any]]:
        """What nothing is trained for."""
        data = self.data
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(ARMS["default"], folder)
            began = time.perf_counter()
            untrained = score_untrained(trainer, trainer.held_out)
            seconds = time.perf_counter() - began
        way, _ = best_way(data.task, trainer.held_out, untrained.ways)
        best = evaluation_metrics(data.task, trainer.held_out, untrained.ways[way])
        found = {_UNTRAINED: {**_result(best, seconds=seconds, steps=0), "way": way}}
        texts = [one.prompt.content for one in data.train]
        asked = [one.prompt.content for one in data.held_out]
        labels, right = answers_of(data.task, data.train), answers_of(data.task, data.held_out)
        answers = {name: BASELINES[name](texts, labels, asked) for name in (MAJORITY, TFIDF)}
        for name, given in (answers | dict(untrained.answers)).items():
            found[name] = _result(data.task.compute_metrics(right, given), seconds=0.0, steps=0)
        return found


def _scored(model: Any, encoder: Encoder, data: TaskData, *, device: torch.device) -> Any:
    encoded = encoder.encode(data.held_out)
    tokens = {"cuda": 2048, "cpu": 512}[device.type]
    scores = score_examples(PackedModel(model.eval()), encoded, device=device, max_tokens=tokens)
    return evaluation_metrics(data.task, encoded, model_outputs(encoded, scores))


def _result(metrics: Any, *, seconds: float, steps: int) -> dict[str, Any]:
    found = {name: round(float(metrics[name]), 5) for name in METRICS}
    return {**found, "seconds": round(seconds, 2), "steps": steps}


class Results:
    """A file with every arm's result of every seed, complete after each of them.

    Args:
        file: where; what it holds of other settings stays.
        setting: of the call.
    """

    def __init__(self, file: Path, setting: Setting) -> None:
        self.file, self._key = file, setting.key()
        self._all: list[dict[str, Any]] = []
        if file.is_file():
            self._all = json.loads(file.read_text(encoding="utf-8"))["results"]

    def of_call(self) -> list[dict[str, Any]]:
        """Those with the call's setting."""
        return [one for one in self._all if one["setting"] == self._key]

    def has(self, arm: str, seed: int) -> bool:
        """Whether this one is there."""
        return any((one["arm"], one["seed"]) == (arm, seed) for one in self.of_call())

    def add(self, arm: str, seed: int, result: dict[str, Any]) -> None:
        """Write one more."""
        self._all.append({"arm": arm, "seed": seed, "setting": self._key, **result})
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        write_json(self.file, {"versions": versions, "results": self._all})


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, the best arm first, as Markdown."""
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        by_arm.setdefault(one["arm"], []).append(one)
    lines = [
        "| arm | macro-F1 | accuracy | seeds | training seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    order = sorted(by_arm, key=lambda arm: -_mean(by_arm[arm], "macro_f1"))
    for arm in order:
        own = by_arm[arm]
        shown = [f"{_mean(own, name):.3f}{_spread(own, name)}" for name in METRICS]
        seconds = _mean(own, "seconds")
        lines.append(f"| {arm} | {' | '.join(shown)} | {len(own)} | {seconds:.0f} |")
    return "\n".join(lines)


def _mean(results: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(one[name] for one in results)


def _spread(results: Sequence[dict[str, Any]], name: str) -> str:
    values = [one[name] for one in results]
    return f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def measure(
    setting: Setting,
    arms: Sequence[str],
    seeds: Sequence[int],
    results: Results,
    *,
    minutes: float | None = None,
) -> list[str]:
    """Run what is not there yet, a seed at a time; what was left out for want of time."""
    began, longest, left = time.monotonic(), 0.0, []
    for number in seeds:
        seed = Seed(setting, number)
        for name in arms:
            wanted = _UNTRAINED if name == RIVALS else name
            if results.has(wanted, number):
                continue
            spent = time.monotonic() - began
            # The next one takes as long as the longest did, as far as is known.
            if minutes is not None and spent + longest > 60 * minutes:
                left.append(f"{name} of seed {number}")
                continue
            for arm, result in _run(seed, name).items():
                results.add(arm, number, result)
                print(f"seed {number}  {arm}: {json.dumps(result)}", flush=True)
            longest = max(longest, time.monotonic() - began - spent)
    return left


def _run(seed: Seed, name: str) -> dict[str, dict[str, Any]]:
    if name == RIVALS:
        return seed.rivals()
    arm = ARMS[name]
    run: Callable[[Arm], dict[str, Any]] = seed.trl if arm.with_trl else seed.ours
    return {name: run(arm)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="the arms, and nothing else")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--arms", nargs="+", default=[RIVALS, *ARMS], choices=(RIVALS, *ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--rows", type=int, default=800, help="training rows")
    parser.add_argument("--held_out", type=int, default=1500, help="rows to look at")
    parser.add_argument("--max_steps", type=int, help="of each run, for a rehearsal")
    parser.add_argument("--minutes", type=float, help="start nothing that would end after these")
    parser.add_argument("--model", default=str(DEFAULT / "smollm2-135m-instruct"))
    parser.add_argument("--table", default=str(DEFAULT / "airline_tweets.csv"))
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--output", type=Path, help="where results are kept, as JSON")
    options = parser.parse_args(arguments)
    if options.list:
        for name, arm in ARMS.items():
            print(f"{name:<24} {'TRL, ' if arm.with_trl else ''}{_told(arm)}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here; rehearse with --device cpu.")
    setting = Setting(
        options.model, options.table, options.task, options.rows, options.held_out,
        options.device, options.max_steps,
    )  # fmt: skip
    file = options.output or ROOT / "benchmarks" / "results" / f"quality-{options.device}.json"
    results = Results(file, setting)
    left = measure(setting, options.arms, range(options.seeds), results, minutes=options.minutes)
    print(f"\n{setting.rows} training rows, {setting.held_out} held out, {setting.device}\n")
    print(table(results.of_call()))
    if left:
        print(f"\nNot run in {options.minutes:g} minutes: {', '.join(left)}. Call it again.")
    return 0


def _told(arm: Arm) -> str:
    plus = {} if arm.ratio is None else {"LoRA+ ratio": arm.ratio}
    given = {**arm.lora, **arm.training, **arm.data, **plus}
    return ", ".join(f"{name} {value}" for name, value in given.items())


if __name__ == "__main__":
    raise SystemExit(main())
