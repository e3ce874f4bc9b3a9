"""Which files and folders a run reads."""

from __future__ import annotations

from lora_fsdp.arguments.adapter import LoraArguments
from lora_fsdp.arguments.data import DataArguments
from lora_fsdp.arguments.model import ModelArguments
from lora_fsdp.arguments.option import check_is_text


def inputs_of_run(
    model: ModelArguments, lora: LoraArguments, data: DataArguments
) -> dict[str, str | None]:
    """What a run reads, by the option that names it.

    Raises:
        ArgumentError: one of them is not a text.
    """
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
