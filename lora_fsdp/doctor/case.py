"""A run that is to be examined, and the facts about it that rules ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_fsdp.adapter.attach import attach_adapter, lora_config
from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.arguments.training import chooses_checkpoint
from lora_fsdp.base.conversion.low_precision import Published, open_weights, published_in
from lora_fsdp.base.folders import read_json_object
from lora_fsdp.base.loading import load_tokenizer
from lora_fsdp.base.stored_weights import BaseWeights, base_folder, base_skeleton
from lora_fsdp.data.checking import TaskCheck, check_task_data
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.rows import TaskData, encoder_of, load_task_data, settled_rows
from lora_fsdp.distributed.launch import fsdp_requested, read_fsdp_settings, read_plugin
from lora_fsdp.distributed.launch_files import Launch, as_launched, read_launch, read_launch_yaml
from lora_fsdp.doctor.fact import UnknownFactError, fact
from lora_fsdp.doctor.machine import Machine
from lora_fsdp.errors import ArgumentError, Fsdp1ConfigError
from lora_fsdp.tasks import Task
from lora_fsdp.training.step.objectives.choice import objective_of
from lora_fsdp.training.step.objectives.objective import Objective

T = TypeVar("T")

#: Rows that are tokenised; of a longer table so many, evenly spread.
LOOKED_AT = 5000


@dataclass(frozen=True)
class Case:
    """A run before it starts. Its facts are worked out when the first rule asks for them.

    Attributes:
        model_args, lora_args, data_args: as for a run.
        training: values of `FineTuningArguments`, which may be such that it refuses them.
        accelerate_config: the YAML.
        num_processes: instead of the YAML's number.
        task: stands in for `data_args.task`.
        machine: where it is to run.
    """

    model_args: ModelArguments
    lora_args: LoraArguments
    data_args: DataArguments
    training: Mapping[str, Any]
    accelerate_config: Path
    num_processes: int | None
    task: Task | None
    machine: Machine

    # ---- the launch -----------------------------------------------------------------------------

    @fact
    def launch_yaml(self) -> dict[str, Any]:
        """The YAML as it is written."""
        return read_launch_yaml(self.accelerate_config)

    @fact
    def launch(self) -> Launch:
        """What accelerate makes of it."""
        self.launch_yaml.value  # noqa: B018 (is known, or this is not either)
        return read_launch(self.accelerate_config, processes=self.num_processes)

    @fact
    def fsdp(self) -> Any:
        """The run's reading of the FSDP settings: `FsdpSettings`, or `None` without FSDP."""
        with as_launched(self.launch.value):
            return read_fsdp_settings()

    @fact
    def plugin(self) -> FullyShardedDataParallelPlugin | None:
        """accelerate's reading of the FSDP2 settings; `None` without FSDP2."""
        with as_launched(self.launch.value):
            if not fsdp_requested() or isinstance(self.fsdp.error, Fsdp1ConfigError):
                return None
            return read_plugin()

    @fact
    def arguments(self) -> FineTuningArguments:
        """The training arguments, as each process would have them."""
        with as_launched(self.launch.value):
            try:
                return FineTuningArguments(**self.training)
            except ArgumentError:
                raise
            except (ImportError, TypeError, ValueError) as error:  # upstream's own checks
                raise ArgumentError(str(error)) from error

    @property
    def output_dir(self) -> Path:
        """Where the run would write."""
        return Path(str(self.training.get("output_dir") or "."))

    @property
    def gpus_used(self) -> bool:
        """Whether the run would be on GPUs."""
        asked = self.launch.value.use_cpu or bool(self.training.get("use_cpu"))
        return bool(self.machine.gpus) and not asked

    @property
    def device(self) -> torch.device:
        """The kind of device that the run would be on."""
        return torch.device("cuda" if self.gpus_used else "cpu")

    # ---- base and adapter -----------------------------------------------------------------------

    @fact
    def folder(self) -> Path:
        """The base's folder; of a Hub model one without weights, unless they are cached."""
        if not (name := self.model_args.model_name_or_path):
            raise ArgumentError("No model given: set --model_name_or_path to a folder or Hub name.")
        return base_folder(name, revision=self.model_args.model_revision, with_weights=False)

    @property
    def is_local(self) -> bool:
        """Whether the base is a folder rather than a Hub name."""
        return Path(self.model_args.model_name_or_path).expanduser().is_dir()

    @fact
    def skeleton(self) -> PreTrainedModel:
        """The base without values, on the meta device."""
        return self._build()

    def _build(self) -> PreTrainedModel:
        remote = self.model_args.trust_remote_code
        return base_skeleton(self.folder.value, trust_remote_code=remote)

    @fact
    def weights(self) -> BaseWeights:
        """The headers of the base's safetensors files."""
        return open_weights(self.folder.value, self._published())

    def _published(self) -> Published | None:
        if not (self.folder.value / "config.json").is_file():
            return None
        config = read_json_object(self.folder.value, "config.json")
        return published_in(config.get("quantization_config"))

    @fact
    def lora(self) -> LoraConfig:
        """The adapter's settings, as PEFT takes them."""
        return lora_config(self.lora_args)

    @fact
    def adapted(self) -> PeftModel:
        """Base and adapter without values. A base of its own: attaching changes it."""
        base, config = self._build(), lora_config(self.lora_args)
        with torch.device("meta"):
            return attach_adapter(base, config)

    # ---- rows -----------------------------------------------------------------------------------

    @fact
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        folder = str(self.folder.value)
        return load_tokenizer(replace(self.model_args, model_name_or_path=folder))

    @fact
    def rows(self) -> TaskData:
        """All rows, as examples of the task."""
        if (seed := int(self.training.get("seed", 42))) < 0:
            raise UnknownFactError  # the rule over the training's numbers says so
        choosing = chooses_checkpoint(self.training)
        return load_task_data(self.data_args, seed=seed, task=self.task, choosing=choosing)

    @fact
    def objective(self) -> Objective:
        """What is minimised."""
        return objective_of(self.rows.value.task, vars(self.arguments.value))

    @fact
    def encoder(self) -> Encoder:
        """What turns examples into tokens."""
        rows = self.settled.value
        return encoder_of(self.data_args, self.tokenizer.value, task=rows.task, shots=rows.shots)

    @fact
    def settled(self) -> TaskData:
        """The rows as the run takes them."""
        tokenizer, seed = self.tokenizer, int(self.training.get("seed", 42))
        return settled_rows(self.data_args, self.rows.value, lambda: tokenizer.value, seed=seed)

    @fact
    def sample(self) -> TaskData:
        """The rows that are tokenised: all, or evenly spread ones of a long table."""
        rows = self.settled.value
        held_out = _spread(rows.held_out, LOOKED_AT // 5)
        test = _spread(rows.test, LOOKED_AT // 5)
        return replace(rows, train=_spread(rows.train, LOOKED_AT), held_out=held_out, test=test)

    @fact
    def encoded(self) -> list[EncodedExample]:
        """The sample as tokens, training rows first."""
        sample = self.sample.value
        return self.encoder.value.encode([*sample.train, *sample.scored])

    @fact
    def task_check(self) -> TaskCheck:
        """What `lora-fsdp tasks check` says of all rows."""
        return check_task_data(self.rows.value, None)

    @fact
    def sample_check(self) -> TaskCheck:
        """What `lora-fsdp tasks check` says of the sample, with its tokens."""
        return check_task_data(self.sample.value, self.encoded.value)


def _spread(items: Sequence[T], most: int) -> list[T]:
    if len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]
