"""Task and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lora_fsdp.arguments.adapter import parse_json_object
from lora_fsdp.arguments.option import option
from lora_fsdp.errors import ArgumentError


@dataclass
class DataArguments:
    """Which task, which rows, and how they become tokens."""

    # The heading of these options in a help text.
    _argument_group_name: ClassVar[str] = "task and rows"

    task: str = option("", "Name of a registered task.")
    task_file: str | None = option(None, "Python file to import first; it registers the task.")
    data_file: str | None = option(
        None,
        "Table: .csv, .tsv, .jsonl, .json, .parquet, .xlsx (text files also packed), a pattern or "
        "a folder of such files, or a dataset's name on the Hub.",
    )
    eval_file: str | None = option(None, "Held-out rows; without it they are split off data_file.")
    test_file: str | None = option(
        None, "Rows that are scored before and after training and decide nothing."
    )
    split_column: str | None = option(
        None,
        "Column that says of each row: train, validation or test. Found when not given; "
        "none = no column, split at random.",
    )
    encoding: str | None = option(None, "Text encoding of the files; detected when not given.")
    delimiter: str | None = option(
        None, "Character between the cells of CSV and TSV (';', tab); found when not given."
    )
    sheet: str | None = option(None, "Sheet of a workbook (.xlsx) with several.")
    instruction: str | None = option(None, "Overrides the task's instruction.")
    text_column: str | None = option(None, "Column with the text.")
    label_column: str | None = option(None, "Column with the label, or the right answer.")
    labels: list[str] | None = option(None, "Closed label set; read from the data when not given.")
    rename_labels: list[str] | None = option(
        None, "Other names for the table's labels: 0=negative 1=positive."
    )
    merge_labels: list[str] | None = option(None, "Several labels as one: other=spam,unknown.")
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
    test_size: float | None = option(
        None,
        "Share of the rows that decide nothing (below 1), or their number. Not given: half of "
        "the held-out rows where the best checkpoint is chosen by them, else none. 0 = none.",
    )
    max_length: int = option(
        512, "Longest example in tokens; longer ones have their text shortened."
    )
    chat_template: bool = option(False, "Put the prompt through the tokenizer's chat template.")
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."
    )
    thinking: Literal["auto", "empty", "none", "own"] = option(
        "auto",
        "Where an answer stands in a chat template with a thinking block: empty = after an empty "
        "block, none = right after the prompt, own = behind the reasoning that each answer brings; "
        "auto = empty where there is a block, else none.",
    )

    few_shot: int = option(
        0,
        "Training rows that every prompt shows with their answers, as many of each label as can "
        "be. They are computed once a packed sequence, are not trained on, and go with the "
        "adapter: predict and serve show the same.",
    )

    def __post_init__(self) -> None:
        # A bool is an int to Python.
        if not isinstance(self.few_shot, int) or self.few_shot is True or self.few_shot < 0:
            raise ArgumentError(f"--few_shot must be 0 (none) or more, not {self.few_shot!r}.")
        if isinstance(self.task_options, str):
            self.task_options = parse_json_object("task_options", self.task_options)
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = parse_json_object(
                "chat_template_kwargs", self.chat_template_kwargs
            )

    def template_kwargs(self) -> dict[str, Any]:
        """What `chat_template_kwargs` hands to the chat template."""
        return dict(self.chat_template_kwargs or {})  # type: ignore[arg-type]
