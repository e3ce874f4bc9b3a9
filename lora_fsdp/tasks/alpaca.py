"""Instruction following in the format of Stanford Alpaca."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_fsdp.tasks.cells import cell_text
from lora_fsdp.tasks.example import Prompt
from lora_fsdp.tasks.generation import GenerationTask
from lora_fsdp.tasks.registry import register_task


@register_task
class AlpacaTask(GenerationTask):
    """Follows instructions, each with or without an input.

    Source of the columns and the wording: https://github.com/tatsu-lab/stanford_alpaca (there, a
    prompt with an input has another first sentence; here all rows begin alike, so that a packed
    sequence computes the beginning once).

    Attributes:
        input_column: column with the input, which may be empty or missing.
    """

    name = "alpaca"
    description = "Instruction following: columns instruction, input, output"

    instruction = (
        "Below is an instruction that describes a task, perhaps with an input that provides "
        "further context. Write a response that appropriately completes the request."
    )
    text_column = "instruction"
    input_column: str = "input"
    label_column = "output"

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        input_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        super().__init__(
            instruction=instruction, text_column=text_column, label_column=label_column
        )
        self.settle({"input_column": input_column})

    def optional_columns(self) -> Sequence[str]:
        """The input's."""
        return (self.input_column,)

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The instruction and, if there is one, the input, which is then what may be shortened."""
        before, after = f"{self.instruction}\n\n### Instruction:\n", "\n\n### Response:"
        asked = cell_text(row[self.text_column])
        given = cell_text(row.get(self.input_column))
        if not given.strip():
            return Prompt(before, asked, after)
        return Prompt(before, given, after, lead=f"{asked}\n\n### Input:\n")

    def split_columns(self) -> tuple[str | None, str | None]:
        """No grouping: one instruction may stand in every row, with other inputs."""
        return None, None

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The response, on a line of its own."""
        return f"\n{cell_text(row[self.label_column]).strip()}"
