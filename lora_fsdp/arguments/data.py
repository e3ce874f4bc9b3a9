"""Task and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lora_fsdp.arguments.adapter import parse_json_object
from lora_fsdp.arguments.option import option


@dataclass
class DataArguments:
    """Which task, which rows, and how they become tokens."""

    # The heading of these options in a help text.
    _argument_group_name: ClassVar[str] = "task and rows"

    task: str = option("", "Name of a registered task.")
    task_file: str | None = option(None, "Python file to import first; it registers the task.")
    data_file: str | None = option(
        None, "CSV, TSV, JSONL, Parquet, or a folder saved by `datasets`."
    )
    eval_file: str | None = option(None, "Held-out rows; without it they are split off data_file.")
    encoding: str | None = option(None, "Text encoding of the files; detected when not given.")
    delimiter: str | None = option(
        None, "Character between the cells of CSV and TSV (';', tab); found when not given."
    )
    instruction: str | None = option(None, "Overrides the task's instruction.")
    text_column: str | None = option(None, "Column with the text.")
    label_column: str | None = option(None, "Column with the label, or the right answer.")
    labels: list[str] | None = option(None, "Closed label set; read from the data when not given.")
    task_options: dict[str, Any] | str | None = option(
        None, 'Further options of the task, as JSON: \'{"choices_column": "options"}\'.'
    )
    weight_column: str | None = option(
        None, "Column with a number from 0: how much a training row counts in the loss."
    )
    class_weights: list[str] | None = option(
        None,
        "How much the training rows of a label count in the loss: label=weight for each "
        "(negative=1 positive=2; a label that is not named weighs 1), or balanced = inversely to "
        "how many rows the label has. Multiplies with --weight_column.",
    )
    on_bad_rows: Literal["error", "drop"] = option(
        "error", "Rows without text or with an unknown label: stop, or drop and count."
    )
    max_rows: int | None = option(None, "Use a seeded random sample of this many rows.")
    head: int | None = option(None, "Use the first rows of the file, as the article does.")
    eval_size: float = option(
        0.1, "Held-out share of the rows (below 1), or their number (1 and above)."
    )
    max_length: int = option(
        512, "Longest example in tokens; longer ones have their text shortened."
    )
    chat_template: bool = option(False, "Put the prompt through the tokenizer's chat template.")

    def __post_init__(self) -> None:
        if isinstance(self.task_options, str):
            self.task_options = parse_json_object("task_options", self.task_options)
