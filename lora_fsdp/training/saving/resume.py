"""What defines a run, and whether a launch can go on from a checkpoint of another.

The order of examples depends on the seed and on the examples of a step, not on the processes they
are divided between. So a run may go on with other processes or accumulation, as long as the
examples of a step stay as many.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.layers import base_model
from lora_fsdp.errors import ResumeMismatchError
from lora_fsdp.placement.decide import Placement
from lora_fsdp.training.run_fingerprints import as_text

logger = logging.getLogger(__name__)

# What the optimizer and its schedule are made of; the checkpoint's are loaded, so that other ones
# would be ignored.
OF_THE_OPTIMIZER = (
    "optim",
    "optim_args",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
)
# A run may go on with other ones, but does not end where it would have.
_CHANGE_THE_END = (
    "num_train_epochs",
    "max_steps",
    "share_prefix",
    "packing",
    "max_tokens_per_row",
)

# Where the base lies, or who wrote the adapter: of no effect on training.
_NOT_OF_THE_ADAPTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
}


def run_facts(
    args: FineTuningArguments, model: PeftModel, *, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """What a checkpoint's marker says of the run, all of it JSON.

    Args:
        args: as they were given, with accumulation.
        model: with its adapter.
        fingerprints: of data, base and adapter (`run_fingerprints`).
    """
    data_seed = args.seed if args.data_seed is None else args.data_seed
    settings = model.peft_config[str(model.active_adapter)].to_dict()
    kept = {key: value for key, value in settings.items() if key not in _NOT_OF_THE_ADAPTER}
    values = {name: str(value) for name, value in args.to_dict().items()}
    return {
        "launch": {
            "per_device_train_batch_size": int(args.per_device_train_batch_size),
            "gradient_accumulation_steps": int(args.gradient_accumulation_steps),
            "processes": int(args.world_size),
        },
        "must_stay": {
            "the seed": str(args.seed),
            "the seed of the data's order": str(data_seed),
            "the base model's architecture": type(base_model(model)).__name__,
            **{name: value for name, value in fingerprints.items() if name in _FINGERPRINTS},
            **{f"LoRA's {name}": as_text(value) for name, value in sorted(kept.items())},
            **{f"--{name}": values[name] for name in OF_THE_OPTIMIZER},
        },
        "may_change": {f"--{name}": values[name] for name in _CHANGE_THE_END},
    }


def facts_once_placed(
    facts: Mapping[str, Any],
    placement: Placement,
    *,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None,
) -> dict[str, Any]:
    """`run_facts`, with what was chosen for this machine: elsewhere a run that goes on rounds
    otherwise.

    Args:
        facts: of `run_facts`.
        placement: how the run computes.
        optimizer: one of the user's own, by class and arguments.
    """
    chosen = {"--step": str(placement.step), "--max_tokens_per_row": str(placement.sequence_length)}
    own = {} if optimizer is None else {"optimizer_cls_and_kwargs": str(optimizer)}
    return {
        **facts,
        "must_stay": facts["must_stay"] | own,
        "may_change": facts["may_change"] | chosen,
    }


_FINGERPRINTS = (
    "the number of training examples",
    "the training examples (SHA-256)",
    "the number of held-out examples",
    "the held-out examples (SHA-256)",
    "the adapter's modules (SHA-256)",
    "the base model (SHA-256 of a sample)",
)


def check_can_resume(
    checkpoint: Path, *, saved: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Compare a checkpoint's run with this one; what may change is said in the log.

    Raises:
        ResumeMismatchError: this launch cannot go on from it; names the values on both sides.
    """
    _check_examples_per_step(checkpoint, saved["launch"], facts["launch"])
    then, now = saved["must_stay"], facts["must_stay"]
    differing = [
        f"{name} ({then.get(name, 'not set')} in the checkpoint, {now.get(name, 'not set')} now)"
        for name in (*then, *(name for name in now if name not in then))
        if then.get(name) != now.get(name)
    ]
    if differing:
        raise ResumeMismatchError(
            f"Cannot resume from {checkpoint}, which is of another run: {'; '.join(differing)}. "
            "Give the values it was started with, or start anew in another --output_dir."
        )
    for name, value in facts["may_change"].items():
        if value != saved["may_change"].get(name, value):  # older ones do not have all
            logger.warning(
                "Resumed with %s %s (%s in the checkpoint): the run will not end as it would have.",
                name,
                value,
                saved["may_change"].get(name),
            )
    if saved["launch"]["processes"] != facts["launch"]["processes"]:
        logger.warning(
            "Resumed on %d processes instead of %d: the same examples at every step, random "
            "numbers (dropout) drawn anew.",
            facts["launch"]["processes"],
            saved["launch"]["processes"],
        )


def _check_examples_per_step(
    checkpoint: Path, saved: Mapping[str, int], launch: Mapping[str, int]
) -> None:
    batch, accumulation, processes = (int(number) for number in launch.values())
    wanted, given = math.prod(saved.values()), math.prod(launch.values())
    if wanted == given:
        return
    each, rest = divmod(wanted, processes)
    if rest:
        remedy = f"{processes} processes cannot share {wanted} examples: start a divisor of it"
    elif each % batch == 0:
        remedy = f"set --gradient_accumulation_steps {each // batch}"
    elif each % accumulation == 0:
        remedy = f"set --per_device_train_batch_size {each // accumulation}"
    else:
        remedy = f"set --per_device_train_batch_size {each} and --gradient_accumulation_steps 1"
    raise ResumeMismatchError(
        f"Cannot resume from {checkpoint} with another number of examples a step (batch size x "
        f"accumulation x processes): it has {_spelt(saved)} = {wanted}, this launch gives "
        f"{_spelt(launch)} = {given}: {remedy}."
    )


def _spelt(launch: Mapping[str, int]) -> str:
    return " x ".join(str(number) for number in launch.values())
