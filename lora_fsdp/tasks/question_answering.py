"""Questions about a text, answered in words of one's own or the text's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_fsdp.tasks.cells import cell_text, cell_value
from lora_fsdp.tasks.example import Prompt
from lora_fsdp.tasks.generation import GenerationTask
from lora_fsdp.tasks.registry import register_task


@register_task
class QuestionAnsweringTask(GenerationTask):
    """Answers questions about a text, measured by SQuAD's exact match and F1.

    An answer is a text, a list of right answers (in CSV a JSON list) or SQuAD's
    `{"text": [...], "answer_start": [...]}`. The first is learnt, and all count as right. An empty
    list says that the text has no answer, as in SQuAD 2.0: what is learnt is to say nothing, which
    is what its metrics count as right.

    Attributes:
        question_column: column with the question; the text is what is shortened.
    """

    name = "question_answering"
    description = "Questions about a text, measured by exact match and F1 as in SQuAD"
    instruction = "Answer the question from the text, in as few words as possible."
    text_column = "context"
    question_column: str = "question"

    def __init__(
        self,
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        question_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        super().__init__(
            instruction=instruction, text_column=text_column, label_column=label_column
        )
        self.settle({"question_column": question_column})

    def input_columns(self) -> Sequence[str]:
        """Text and question."""
        return self.text_column, self.question_column

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """A missing text, or no answer."""
        found = super().fault(row, with_labels=with_labels)
        if found is None and with_labels and not self.build_references(row):
            return f"column {self.label_column!r} holds no answer"
        return found

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """Text, question, and the cue for the answer."""
        return Prompt(
            before=f"Instruction: {self.instruction}\nText: ",
            text=cell_text(row[self.text_column]),
            after="\nAnswer:",
            tail=f"\nQuestion: {cell_text(row[self.question_column]).strip()}",
        )

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The first right answer, after a space; "" where there is none, so the end at once."""
        answer = self.build_references(row)[0]
        return f" {answer}" if answer else ""

    def build_references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """All right answers, each once; "" alone says that the text has none."""
        cell = cell_value(row[self.label_column])
        given = cell.get("text") if isinstance(cell, dict) else cell
        if given in ([], [""]):
            return ("",)
        texts = given if isinstance(given, list) else [given]
        return tuple(dict.fromkeys(text for one in texts if (text := cell_text(one).strip())))
