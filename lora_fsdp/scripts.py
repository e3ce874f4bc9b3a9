"""What every script does first: options and recipe in, argument objects out, errors in one line."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from types import TracebackType
from typing import TypedDict

import transformers
from trl import TrlParser

from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.errors import LoraFsdpError


class RunArguments(TypedDict):
    """The keyword arguments of `lora_fsdp.finetune`."""

    model_args: ModelArguments
    lora_args: LoraArguments
    data_args: DataArguments
    training_args: FineTuningArguments


def parse_arguments(*, task: str) -> RunArguments:
    """The run that the command line and its `--config recipe.yaml` describe.

    Args:
        task: the task when none is named.
    """
    configure_output()
    parser = TrlParser((ModelArguments, LoraArguments, DataArguments, FineTuningArguments))
    parser.set_defaults(task=task)
    model, lora, data, training = parser.parse_args_and_config()
    return RunArguments(model_args=model, lora_args=lora, data_args=data, training_args=training)


def configure_output() -> None:
    """Our log lines from rank 0, libraries only when they warn, our errors without a traceback."""
    is_first = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("lora_fsdp").setLevel(logging.INFO if is_first else logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # peft 0.21 asks transformers >= 5.20 by the switch's old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    sys.excepthook = _print_own_errors_in_one_line


def _print_own_errors_in_one_line(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, LoraFsdpError):
        sys.__excepthook__(kind, error, traceback)
        return
    print(f"{kind.__name__}: {error}", file=sys.stderr, flush=True)
