"""What the adapters of a run have in common: rows, tokens, base, the untrained model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.rows import TaskData, encoder_of
from lora_fsdp.evaluation.comparison import Comparison
from lora_fsdp.evaluation.intervals import PairedBootstrap
from lora_fsdp.evaluation.metrics import answers_of, evaluation_metrics
from lora_fsdp.evaluation.outputs import TUNED, write_json
from lora_fsdp.evaluation.verdict import BASELINE
from lora_fsdp.reporting.run_files import METRICS_FILE
from lora_fsdp.sweeps.earlier import STOPPED_FILE, TEST_FILE, TEST_INTERVAL
from lora_fsdp.sweeps.grid import Asked, asked_adapters
from lora_fsdp.sweeps.kept_base import KeptBase
from lora_fsdp.sweeps.rows import RowsOfRun, rows_of_run
from lora_fsdp.tasks import Example
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.training.rivals import Untrained


@dataclass(frozen=True, kw_only=True)
class Once:
    """What is read, tokenised, opened and scored once for all adapters of a run.

    Attributes:
        model, lora, data_args, training: the arguments.
        data: task and examples.
        tokenizer: the base's.
        untrained: what the untrained model and the baselines answer, by fold, as far as is known.
    """

    model: ModelArguments
    lora: LoraArguments
    data_args: DataArguments
    training: FineTuningArguments
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    untrained: dict[int | None, Untrained] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The output folder; each adapter has a folder in it."""
        return Path(str(self.training.output_dir))

    @cached_property
    def asked(self) -> list[Asked]:
        """The adapters."""
        return asked_adapters(self.training)

    def of(self, name: str) -> Asked:
        """The adapter of that name."""
        return next(one for one in self.asked if one.name == name)

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

    def data_of(self, one: Asked) -> TaskData:
        """The task with an adapter's own rows, without those for the test of the best."""
        train, held_out = self.rows.of(one.fold)
        return replace(self.data, train=train, held_out=held_out, test=[])

    def config(self, one: Asked) -> LoraConfig:
        """The adapter's settings."""
        return lora_config(one.adapter(self.lora), revision=self.model.model_revision)

    @cached_property
    def base(self) -> KeptBase:
        """Of all adapters."""
        return KeptBase(self.model, device=self.training.device)

    @cached_property
    def encoder(self) -> Encoder:
        """Of all examples."""
        data = self.data
        return encoder_of(self.data_args, self.tokenizer, task=data.task, shots=data.shots)

    @cached_property
    def _encoded(self) -> dict[int, EncodedExample]:
        """By the identity of the example."""
        everything = [*self.data.train, *self.data.scored]
        return {
            id(example): tokens
            for example, tokens in zip(everything, self.encoder.encode(everything), strict=True)
        }

    def tokens(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Of `examples`, which are the run's; each is tokenised once."""
        return [self._encoded[id(example)] for example in examples]

    def know(self, fold: int | None, untrained: Untrained, comparison: Comparison) -> None:
        """Keep what an adapter's comparison has found out about all others.

        Args:
            fold: whose rows were scored.
            untrained: the untrained model's answers to them.
            comparison: with the baselines' answers.
        """
        table, rivals = comparison.predictions, self.data.task.answer_kind.rivals
        known = {name: table[f"{BASELINE}{name}"].tolist() for name in rivals}
        self.untrained[fold] = replace(untrained, answers={**known, **untrained.answers})

    # ---- what is finished -----------------------------------------------------------------------

    def is_finished(self, name: str) -> bool:
        """Whether an earlier session has trained and scored this adapter, or found it diverging."""
        folder = self.root / name
        files = [METRICS_FILE, "adapter_config.json"] + [TEST_FILE] * bool(self.rows.test)
        done = all((folder / file).is_file() for file in files)
        return bool(self.training.resume_from_checkpoint) and (
            done or (folder / STOPPED_FILE).is_file()
        )

    def write_results(self, name: str, comparison: Comparison, test: ModelOutputs | None) -> None:
        """Write an adapter's figures into its folder; for one rank to call."""
        folder = self.root / name
        if test is not None:
            metrics: dict[str, Any] = dict(self._test_metrics(test))
            metrics[TEST_INTERVAL] = self._test_interval(test, metrics)
            write_json(folder / TEST_FILE, metrics)
        comparison.save(folder)  # last: `metrics.json` says that the adapter is finished

    def _test_metrics(self, test: ModelOutputs) -> Mapping[str, float]:
        return evaluation_metrics(self.data.task, self.tokens(self.rows.test), test)

    def _test_interval(
        self, test: ModelOutputs, metrics: Mapping[str, float]
    ) -> list[float] | None:
        """Of the deciding metric over other test rows; `None` where rows do not give it."""
        examples, task = self.rows.test, self.data.task
        kind, metric = task.answer_kind, task.primary_metric
        scores = kind.row_scores(metric, examples, test)
        weights = kind.row_weights(metric, examples, test)
        bootstrap = PairedBootstrap(
            answers_of(task, examples),
            {TUNED: ["" if one is None else one for one in kind.answers(examples, test)]},
            labels=kind.labels,
            scores={} if scores is None else {(TUNED, metric): scores},
            weights={} if weights is None else {(TUNED, metric): weights},
        )
        if not bootstrap.knows(TUNED, metric):
            return None
        found = bootstrap.interval(TUNED, metric)
        same = np.isclose(found.value, metrics[metric], atol=1e-6)
        return [found.low, found.high] if same else None
