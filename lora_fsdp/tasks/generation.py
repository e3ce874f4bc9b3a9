"""Free text: one text in, another one out, written by greedy decoding and compared as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_fsdp.tasks.cells import cell_text
from lora_fsdp.tasks.columns import ColumnTask
from lora_fsdp.tasks.example import Example, Prompt
from lora_fsdp.tasks.registry import register_task
from lora_fsdp.tasks.text_metrics import exact_match, token_f1


@register_task
class GenerationTask(ColumnTask):
    """Writes a text for each text of a table. Complete as it is; subclasses set class attributes.

    Every class attribute is also a constructor argument. A subclass with metrics of its own writes
    `score_answer`, or `measure_answers` if they are no means over the rows.
    """

    name = "generation"
    description = "Free text for each text of a table, by an instruction of one's own"
    primary_metric = "token_f1"
    instruction = "Continue as in the examples."

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """Instruction, input, and the cue for the answer."""
        return Prompt(
            before=f"Instruction: {self.instruction}\nInput: ",
            text=cell_text(row[self.text_column]),
            after="\nOutput:",
        )

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The answer, after a space."""
        return f" {cell_text(row[self.label_column]).strip()}"

    def score_answer(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Scores of one answer, each from 0 to 1; the metrics are their means over the rows.

        Args:
            answer: what was written; "" = nothing.
            references: one right answer or more.
        """
        return {
            "token_f1": token_f1(answer, references),
            "exact_match": exact_match(answer, references),
        }

    def measure_answers(
        self, answers: Sequence[str | None], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """Metrics of N answers (`None` = none), each against its right answers."""
        scores = [
            self.score_answer(answer or "", right)
            for answer, right in zip(answers, references, strict=True)
        ]
        return {name: sum(row[name] for row in scores) / len(scores) for name in scores[0]}

    def measure(
        self, examples: Sequence[Example], answers: Sequence[str | None]
    ) -> dict[str, float]:
        """See the base class; a row's further right answers count."""
        right = [example.references or (self.answer_of(example),) for example in examples]
        return self.measure_answers(answers, right)

    def compute_metrics(
        self, targets: Sequence[str], predictions: Sequence[str | None]
    ) -> dict[str, float]:
        """See the base class."""
        return self.measure_answers(predictions, [(target,) for target in targets])
