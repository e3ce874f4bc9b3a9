"""What is learnt: rows in, prompt and target text out. No tokenizer, device, rank or batch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_fsdp.errors import IncompleteTaskError

if TYPE_CHECKING:
    import datasets
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in three parts. Only `text` is ever shortened to fit the length limit.

    `before` and `after` hold the instruction and the cue for the answer; what is the same in every
    row of a task should stand in `before`, where packed rows compute it once.
    """

    before: str
    text: str
    after: str

    def __str__(self) -> str:
        return f"{self.before}{self.text}{self.after}"


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready to be tokenised.

    Attributes:
        row: number of the row in its table (1 = first data row), for messages and reports.
        prompt: what the model is given.
        target: what it must continue with, to the letter (for most prompts it starts with a
            space); `None` for a row without an answer, which can be predicted but not trained on.
    """

    row: int
    prompt: Prompt
    target: str | None


class Task:
    """Base class of all tasks: rows in, prompts and targets out, text in, metrics out.

    A subclass sets `name` and writes `build_prompt` and `build_target`. `labels` is `None` for a
    free-text task, or the closed set of answers, which evaluation then scores by likelihood.

    Attributes:
        name: the task's name in the registry.
        description: one line for listings.
        labels: closed set of answers, or `None`.
        primary_metric: the key of `compute_metrics` that says which of two adapters is better.
    """

    name: str = ""
    description: str = ""
    labels: Sequence[str] | None = None
    primary_metric: str = "exact_match"

    def load(self, split: str) -> pd.DataFrame | None:
        """Rows of the task's own data for `split` ("train" or "test").

        `None` (the default) means that the task brings no data of its own: the rows come from the
        table the user names.
        """
        return None

    def split_columns(self) -> tuple[str | None, str | None]:
        """Columns by which a table is split: rows with equal values of the first stay together,
        and the second is stratified by. `None` = not at all.
        """
        return None, None

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Task:
        """The same task with everything settled that depends on the table (columns, labels).

        Args:
            table: the rows; their index gives the row numbers in messages.
            with_labels: `False` for a table to predict, which needs no labels.
            for_training: `False` for a table to evaluate on, where one label is no mistake.
        """
        return self

    def options(self) -> dict[str, Any]:
        """Constructor options with which `get_task` makes this bound task again, JSON-ready.

        They are written beside an adapter, so that it can later be asked as it was trained.
        """
        return {}

    def drop_bad_rows(
        self, table: pd.DataFrame, *, with_labels: bool = True
    ) -> tuple[pd.DataFrame, int]:
        """The table without the rows that cannot be used, and how many were left out."""
        return table, 0

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt for one row."""
        raise IncompleteTaskError(f"Task {self.name!r} does not define build_prompt(row).")

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The answer for one row, to the letter, without the end token."""
        raise IncompleteTaskError(f"Task {self.name!r} does not define build_target(row).")

    def target_of(self, label: str) -> str:
        """The target text that stands for `label` (closed label sets only)."""
        return f" {label}"

    def examples(self, table: pd.DataFrame, *, with_targets: bool = True) -> list[Example]:
        """All rows of `table` as examples, in order; the index gives the row numbers."""
        columns = [str(column) for column in table.columns]
        rows = (dict(zip(columns, values, strict=True)) for values in table.itertuples(index=False))
        return [
            Example(
                row=int(number),
                prompt=self.build_prompt(row),
                target=self.build_target(row) if with_targets else None,
            )
            for number, row in zip(table.index, rows, strict=True)
        ]

    def parse(self, text: str) -> str | None:
        """The answer in a generated continuation, or `None` if there is none.

        `text` is only what the model wrote after the prompt, so nothing in the prompt can be
        mistaken for the answer.
        """
        return text.strip() or None

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """Scores of `predictions` (parsed answers; `None` = no answer) against `targets`."""
        matches = [
            target == prediction for target, prediction in zip(targets, predictions, strict=True)
        ]
        return {"exact_match": sum(matches) / len(matches)}

    def to_prompt_completion(
        self, examples: Sequence[Example], *, conversational: bool = False
    ) -> datasets.Dataset:
        """TRL's prompt-completion format, so that the same task trains in `trl.SFTTrainer`.

        Source: https://huggingface.co/docs/trl/dataset_formats
        """
        import datasets

        def column(role: str, texts: list[str]) -> list[Any]:
            if not conversational:
                return texts
            return [[{"role": role, "content": text.strip()}] for text in texts]

        prompts = column("user", [str(example.prompt) for example in examples])
        completions = column("assistant", [example.target or "" for example in examples])
        return datasets.Dataset.from_dict({"prompt": prompts, "completion": completions})
