"""What is learnt: rows in, prompt and target text out. No tokenizer, device, rank or batch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_fsdp.errors import ArgumentError, IncompleteTaskError, MalformedRowError
from lora_fsdp.tasks.answers import AnswerKind, ClosedSet, FreeText, ModelOutputs, OwnChoices
from lora_fsdp.tasks.cells import records
from lora_fsdp.tasks.example import TEXT_PLACEHOLDER, Example, Prompt

if TYPE_CHECKING:
    import datasets
    import pandas as pd


class Task:
    """Base class of all tasks: rows in, prompts and targets out, text in, metrics out.

    A subclass sets `name` and defines `build_prompt` and `build_target`. Its answers are one of a
    closed set (`labels`), one of the row's own (`per_row_choices`), both scored by likelihood; or
    free text, which greedy decoding generates; or of a kind of its own (`answer_kind`).

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
    #: How columns were found that nobody named, a sentence; "" = nothing was guessed.
    guessed: str = ""

    @property
    def answer_kind(self) -> AnswerKind:
        """What sort of answers it has, and all that follows from it."""
        if self.per_row_choices:
            return OwnChoices()
        return FreeText(self.parse) if self.labels is None else self._closed_set()

    def _closed_set(self) -> ClosedSet:
        return ClosedSet(self.labels or (), self.target_of)

    @property
    def is_free_text(self) -> bool:
        """Whether its answers are generated, and not chosen from a set."""
        return self.answer_kind.generates_text

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

    def facts(self) -> dict[str, Any]:
        """What `lora-fsdp tasks show` lists, JSON-ready: the options, by default."""
        return self.options()

    def bad_rows(self, table: pd.DataFrame, *, with_labels: bool = True) -> pd.Series:
        """What is wrong with each row that cannot be used, under its index in `table`."""
        return table.iloc[:0].index.to_series()

    def drop_bad_rows(
        self, table: pd.DataFrame, *, with_labels: bool = True
    ) -> tuple[pd.DataFrame, int]:
        """The table without its bad rows, row numbers kept, and how many were left out."""
        bad = self.bad_rows(table, with_labels=with_labels)
        return table[~table.index.isin(bad.index)], len(bad)

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt for one row."""
        raise IncompleteTaskError(f"Task {self.name!r} does not define build_prompt(row).")

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The exact answer for one row, without the end token."""
        raise IncompleteTaskError(f"Task {self.name!r} does not define build_target(row).")

    def build_choices(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The targets among which the row's answer is; none unless the row brings its own."""
        return ()

    def placeholder_row(self) -> Mapping[str, Any] | None:
        """A row whose cells say in braces what stands there, such as `{text}`.

        It shows a reader the prompt to the letter without a row of the user's. `None` = the task
        names no columns, and a prompt of its table is shown without what comes from the row.
        """
        return None

    @property
    def takes_one_text(self) -> bool:
        """Whether a text alone is a row of it, as for `lora-fsdp predict --text`."""
        if (row := self.placeholder_row()) is None:
            return not self.per_row_choices
        return list(row.values()) == [TEXT_PLACEHOLDER]

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

    def input_fault(self, row: Mapping[str, Any]) -> str | None:
        """What keeps a row with a text from being predicted, naming the column, or `None`."""
        return None

    def build_references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """All right answers of a free-text row, if there may be more than its target."""
        return ()

    def build_shares(self, row: Mapping[str, Any]) -> tuple[float, ...]:
        """How right each candidate is, where more than the target may be; none otherwise."""
        return ()

    def target_of(self, label: str) -> str:
        """The target text that stands for `label` (closed label sets only)."""
        return f" {label}"

    def examples(self, table: pd.DataFrame, *, with_targets: bool = True) -> list[Example]:
        """All rows of `table` as examples, in order; the index gives the row numbers."""
        return [
            Example(
                row=int(number),
                prompt=self.build_prompt(row),
                target=self.build_target(row) if with_targets else None,
                choices=self.checked_choices(int(number), row),
                references=self.build_references(row) if with_targets else (),
                shares=self.build_shares(row) if with_targets else (),
            )
            for number, row in zip(table.index, records(table), strict=True)
        ]

    def parse(self, text: str) -> str | None:
        """The answer in a generated continuation, or `None` if there is none.

        `text` is only what the model generated after the prompt, so nothing in the prompt can be
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
        own = self.answer_kind.metrics(targets, predictions)
        return {"exact_match": sum(matches) / len(matches), **own}

    def answer_of(self, example: Example) -> str:
        """The right answer as metrics compare it: a label of the closed set, or the target text."""
        return self.answer_kind.answer_of(example)

    def measure(
        self, examples: Sequence[Example], answers: Sequence[str | None]
    ) -> dict[str, float]:
        """Metrics of the answers to `examples`, all with targets; `None` = no answer."""
        return self.compute_metrics([self.answer_of(example) for example in examples], answers)

    def only(self, questions: Sequence[str]) -> Task:
        """The same task asking only some of its questions, by their names.

        Raises:
            ArgumentError: it has no several questions, or none of that name.
        """
        raise ArgumentError(
            f"Task {self.name!r} asks one question: there are no others to leave out "
            f"({', '.join(map(str, questions))})."
        )

    @property
    def is_undecided(self) -> bool:
        """Whether validation rows are to decide something of its answers (`decided_by`)."""
        return False

    def decided_by(self, examples: Sequence[Example], outputs: ModelOutputs) -> Task:
        """The same task with what validation rows decide of its answers, such as thresholds.

        Args:
            examples: rows that are neither trained on nor reported on.
            outputs: the tuned model's, for them.
        """
        return self

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
