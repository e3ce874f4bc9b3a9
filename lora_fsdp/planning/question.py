"""What is planned for: a recipe's run, on any number of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.loading import resolve_dtype
from lora_fsdp.compute.architectures import why_apart
from lora_fsdp.data.workload import Work
from lora_fsdp.distributed.launch import read_fsdp_settings
from lora_fsdp.distributed.launch_files import as_launched, read_launch
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.whole_job import RENTED, Job, Machine
from lora_fsdp.planning.candidates import Question
from lora_fsdp.sizing.counting import build_on_meta, shape_of

_GPU, _CPU = torch.device("cuda"), torch.device("cpu")


def question_of_recipe(
    config: PretrainedConfig,
    *,
    model_args: ModelArguments,
    adapter: LoraConfig,
    training: Mapping[str, Any],
    work: Callable[[int, Request], Work],
    yaml_for: Callable[[int], Path],
    shipped: Mapping[str, Path],
    is_open: bool,
    hosts: int = 1,
    on_cpu: bool = False,
    machine: Machine = RENTED,
    job: Job | None = None,
) -> Question:
    """The run of a recipe, to be planned.

    Args:
        config, model_args: of the base.
        adapter: what is trained.
        training: values of `FineTuningArguments` by name.
        work: what the run computes on so many ranks, with examples laid into sequences as that asks
            for.
        yaml_for: the accelerate YAML for a number of GPUs.
        shipped, is_open: see `Question`.
        hosts: machines that the ranks are on.
        on_cpu: whether they compute on CPUs.
        machine, job: see `Question`.

    Raises:
        UnsupportedModelError, TargetModulesError: as `shape_of`.
    """
    skeleton = _skeleton(config, model_args, on_cpu=on_cpu)
    apart = why_apart(skeleton)

    @cache
    def request(ranks: int) -> Request:
        machines = hosts if hosts > 1 else None
        fsdp, mixed_precision = _read_yaml(yaml_for(ranks), ranks, machines=machines)
        return Request.of(
            training,
            fsdp=fsdp,
            quantized=model_args.load_in_4bit,
            autocast=mixed_precision or bool(training["bf16"] or training["fp16"]),
            config=skeleton.config,
            lora_dropout=bool(adapter.lora_dropout),
            why_apart=apart,
        )

    asked = request(hosts)
    packed = not asked.packing_choice.packing.is_apart
    return Question(
        model=model_args.model_name_or_path,
        shape=shape_of(skeleton, adapter, stay=asked.why_not_fused, packed=packed),
        request=request,
        work=cache(lambda ranks: work(ranks, asked)),
        shipped={name: _read_yaml(file, 2)[0] for name, file in shipped.items()},
        dtype=str(skeleton.dtype).removeprefix("torch."),
        is_open=is_open,
        machine=machine,
        job=job,
    )


def _skeleton(
    config: PretrainedConfig, model_args: ModelArguments, *, on_cpu: bool
) -> PreTrainedModel:
    attention = model_args.attn_implementation
    return build_on_meta(
        config,
        dtype=resolve_dtype(model_args.dtype, device=_CPU if on_cpu else _GPU),
        attention=None if attention == "auto" else attention,
        trust_remote_code=model_args.trust_remote_code,
    )


def _read_yaml(
    file: Path, ranks: int, *, machines: int | None = None
) -> tuple[FsdpSettings | None, bool]:
    """The FSDP settings that ranks read, and whether they compute in mixed precision."""
    launch = read_launch(file, processes=ranks, machines=machines)
    with as_launched(launch):
        settings = read_fsdp_settings()
    return settings, launch.environment.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
