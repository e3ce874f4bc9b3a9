"""What every script does first: options and recipe in, argument objects out, errors in one line."""

from __future__ import annotations

import atexit
import difflib
import logging
import os
import sys
import warnings
from dataclasses import fields
from types import TracebackType
from typing import NoReturn, TypedDict

import torch.distributed as dist
import transformers
from trl import TrlParser  # type: ignore[attr-defined]

from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.distributed.orphans import end_with_launcher
from lora_fsdp.errors import ArgumentError, LoraFsdpError
from lora_fsdp.recipes import read_recipe

_CLASSES = (ModelArguments, LoraArguments, DataArguments, FineTuningArguments)


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

    Raises:
        ArgumentError: an unknown option or recipe key; the message suggests the nearest.
    """
    configure_output()
    parser = _Parser(_CLASSES)  # type: ignore[arg-type]
    parser.set_defaults(task=task)
    given = sys.argv[1:]
    if "--config" in given[:-1]:
        place = given.index("--config")
        # Before the command line's own, which come later and so win.
        given[:] = (
            read_recipe(given[place + 1], options=_known()) + given[:place] + given[place + 2 :]
        )
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    except LoraFsdpError:
        raise
    except (TypeError, ValueError) as error:  # TrainingArguments' own checks
        raise ArgumentError(str(error)) from error
    if unknown:
        raise ArgumentError(_unknown_options(unknown))
    model, lora, data, training = parsed
    return RunArguments(model_args=model, lora_args=lora, data_args=data, training_args=training)


def configure_output() -> None:
    """Our log lines from rank 0, libraries only when they warn, our errors without a traceback."""
    end_with_launcher()
    is_first = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("lora_fsdp").setLevel(logging.INFO if is_first else logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # peft 0.21 asks transformers >= 5.20 by the switch's old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    sys.excepthook = _print_own_errors_in_one_line
    atexit.register(_leave_process_group)


class _Parser(TrlParser):
    """Raises what argparse would print below a page of options before it ends the program."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message[:500]}. See --help.")


def _known() -> list[str]:
    return [field.name for cls in _CLASSES for field in fields(cls) if field.init]


def _unknown_options(unknown: list[str]) -> str:
    hints = []
    for option in [text.partition("=")[0] for text in unknown if text.startswith("--")]:
        # Without the value, which may be a token.
        nearest = difflib.get_close_matches(option.lstrip("-"), _known(), n=1)
        hints.append(f"{option} (did you mean --{nearest[0]}?)" if nearest else option)
    return f"Unknown option or recipe key: {', '.join(hints) or ' '.join(unknown)}. See --help."


def _print_own_errors_in_one_line(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, LoraFsdpError):
        sys.__excepthook__(kind, error, traceback)
        return
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    print(f"{rank}{kind.__name__}: {error}", file=sys.stderr, flush=True)


def _leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
