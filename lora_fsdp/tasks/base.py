"""What is learnt: rows in, prompt and target text out. No tokenizer, device, rank or batch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_fsdp.errors import IncompleteTaskError, MalformedRowError

if TYPE_CHECKING:
    import datasets
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given: the author's words around a row's. Only `text` is ever shortened.

    `before` and `after` hold the instruction and the cue for the answer; what is the same in every
    row of a task should stand in `before`, where packed rows compute it once. They may hold control
    tokens. What comes from a row belongs into the other parts, where a control token that it spells
    is taken as the letters it is.

    Attributes:
        before: the author's words before the row's.
        text: the row's text, of which the end is cut if the prompt is too long.
        after: the author's words after the row's.
        lead, tail: what else of the row stands right before and right after `text`, whole.
        turns: (role, content) of the messages before this one; for chat templates only.
    """

    before: str
    text: str
    after: str
    lead: str = ""
    tail: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def message(self) -> str:
        """The prompt without the turns before it."""
        return f"{self.before}{self.lead}{self.text}{self.tail}{self.after}"

    @property
    def content(self) -> str:
        """All that comes from the row, which tells rows apart."""
        return "\n".join([*(text for _, text in self.turns), f"{self.lead}{self.text}{self.tail}"])

    def __str__(self) -> str:
        return "".join(f"{role}: {text}\n" for role, text in self.turns) + self.message


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready to be tokenised.

    Attributes:
        row: number of the row in its table (1 = first data row), for messages and reports.
        prompt: what the model is given.
        target: what it must continue with, to the letter (for most prompts it starts with a
            space); `None` for a row without an answer, which can be predicted but not trained on.
        choices: the targets among which this row's answer is, if they are its own and not those of
            the task's label set; empty otherwise.
        references: further right answers of a free-text row, for its metrics.
    """

    row: int
    prompt: Prompt
    target: str | None
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


class Task:
    """Base class of all tasks: rows in, prompts and targets out, text in, metrics out.

    A subclass sets `name` and writes `build_prompt` and `build_target`. Answers are of one of three
    kinds: one of a closed set (`labels`), one of the row's own (`per_row_choices`), both scored by
    likelihood; or free text, which greedy decoding writes.

    Attributes:
        name: the task's name in the registry.
        description: one line for listings.
        labels: closed set of answers, or `None`.
        per_row_choices: whether each row brings its own choices (`build_choices`).
        primary_metric: the key of `compute_metrics` that says which of two adapters is better.
    """

    name: str = ""
    description: str = ""
    labels: Sequence[str] | None = None
    per_row_choices: bool = False
    primary_metric: str = "exact_match"

    @property
    def is_free_text(self) -> bool:
        """Whether its answers are written, and not chosen from a set."""
        return self.labels is None and not self.per_row_choices

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

    def build_choices(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The targets among which the row's answer is; none unless the row brings its own."""
        return ()

    def checked_choices(self, number: int, row: Mapping[str, Any]) -> tuple[str, ...]:
        """`build_choices` of row `number`.

        Raises:
            MalformedRowError: the row should bring its own choices, and brings fewer than two.
        """
        choices = tuple(self.build_choices(row))
        if self.per_row_choices and len(choices) < 2:
            raise MalformedRowError(
                f"Row {number} brings {len(choices)} choices to task {self.name!r}: it needs two "
                "or more."
            )
        return choices

    def build_references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """All right answers of a free-text row, if there may be more than its target."""
        return ()

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
                choices=self.checked_choices(int(number), row),
                references=self.build_references(row) if with_targets else (),
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

    def answer_of(self, example: Example) -> str:
        """The right answer as metrics compare it: a label of the closed set, or the target text."""
        target = example.target or ""
        labels = (label for label in self.labels or () if self.target_of(label) == target)
        return next(labels, target.strip())

    def measure(
        self, examples: Sequence[Example], answers: Sequence[str | None]
    ) -> dict[str, float]:
        """Metrics of the answers to `examples`, all with targets; `None` = no answer."""
        return self.compute_metrics([self.answer_of(example) for example in examples], answers)

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
        if conversational:
            messages = column("user", [example.prompt.message for example in examples])
            prompts = [
                [*({"role": role, "content": text} for role, text in example.prompt.turns), *last]
                for example, last in zip(examples, messages, strict=True)
            ]
        completions = column("assistant", [example.target or "" for example in examples])
        return datasets.Dataset.from_dict({"prompt": prompts, "completion": completions})
