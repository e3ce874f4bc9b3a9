"""What every script does first: options and recipe in, argument objects out, errors in one line."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Sequence
from typing import TypedDict

import torch.distributed as dist
import transformers

from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.distributed.lost_hosts import watch_hosts
from lora_fsdp.distributed.orphans import end_with_launcher
from lora_fsdp.failures import report_failure
from lora_fsdp.options import OptionParser
from lora_fsdp.printing import ignore_known_warnings
from lora_fsdp.ranks import is_joined
from lora_fsdp.training.logging.time_spent import process_began


class RunArguments(TypedDict):
    """The keyword arguments of `lora_fsdp.finetune`."""

    model_args: ModelArguments
    lora_args: LoraArguments
    data_args: DataArguments
    training_args: FineTuningArguments


def parse_arguments(*, task: str, arguments: Sequence[str] | None = None) -> RunArguments:
    """The run that the command line and its `--config recipe.yaml` describe.

    Args:
        task: the task when none is named.
        arguments: the command line; `None` = this process's own.

    Raises:
        ArgumentError: an unknown option or recipe key (the message suggests the nearest), or a
            recipe that cannot be read.
    """
    configure_output()
    classes = (ModelArguments, LoraArguments, DataArguments, FineTuningArguments)
    parser = OptionParser(classes, positional="data_file")
    parser.set_defaults(task=task)
    model, lora, data, training = parser.parse(sys.argv[1:] if arguments is None else arguments)
    return RunArguments(model_args=model, lora_args=lora, data_args=data, training_args=training)


def configure_output() -> None:
    """Our log lines from rank 0, libraries only when they warn, our errors without a traceback."""
    end_with_launcher()
    watch_hosts()
    process_began()
    is_first = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("lora_fsdp").setLevel(logging.INFO if is_first else logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    ignore_known_warnings()
    sys.excepthook = report_failure
    atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    if is_joined():
        dist.destroy_process_group()
