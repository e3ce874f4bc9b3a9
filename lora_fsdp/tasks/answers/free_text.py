"""Text of any kind, by greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_fsdp.tasks.answers.kind import AnswerKind, ModelOutputs, Section
from lora_fsdp.tasks.example import Example


class FreeText(AnswerKind):
    """What a model generates; beside it, the target is scored.

    Args:
        parse: finds the answer in a generated text (`Task.parse`).
        score: an answer's metrics by the right answers, where those of the rows are their means.
        weigh: how much the answer counts in the mean of a metric, by its name; 1 where it is not
            named.
    """

    name = "free_text"
    description = "free text, by greedy decoding"
    generates_text = True
    report_sections = (Section.FREE_TEXT,)
    answer_column = "predicted_text"

    def __init__(
        self,
        parse: Callable[[str], str | None],
        score: Callable[[str, Sequence[str]], Mapping[str, float]] | None = None,
        weigh: Callable[[str, Sequence[str]], Mapping[str, float]] | None = None,
    ) -> None:
        self._parse = parse
        self._score = score
        self._weigh = weigh

    def candidates(self, example: Example) -> Sequence[str]:
        """None."""
        return ()

    def answers(self, examples: Sequence[Example], outputs: ModelOutputs) -> Sequence[str | None]:
        """What is found in the generated text."""
        return [self._parse(text) for text in outputs.texts]

    def probabilities(self, outputs: ModelOutputs) -> Sequence[float | None]:
        """Of the target's text, where it was scored; that of a generated text is not known."""
        if outputs.log_likelihoods.shape[1] == 0:
            return [None] * len(outputs.log_likelihoods)
        return np.exp(outputs.log_likelihoods[:, 0]).tolist()

    def row_scores(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """What `score` says of each row."""
        return self._by_row(self._score, metric, examples, outputs)

    def row_weights(
        self, metric: str, examples: Sequence[Example], outputs: ModelOutputs
    ) -> Sequence[float] | None:
        """What `weigh` says of each row."""
        return self._by_row(self._weigh, metric, examples, outputs)

    def _by_row(
        self,
        ask: Callable[[str, Sequence[str]], Mapping[str, float]] | None,
        metric: str,
        examples: Sequence[Example],
        outputs: ModelOutputs,
    ) -> Sequence[float] | None:
        if ask is None:
            return None
        given = zip(self.answers(examples, outputs), examples, strict=True)
        found = [ask(answer or "", self.references(example)) for answer, example in given]
        return [row[metric] for row in found] if found and metric in found[0] else None

    def references(self, example: Example) -> Sequence[str]:
        """All right answers to an example."""
        return example.references or (self.answer_of(example),)

    def predicted_columns(
        self, examples: Sequence[Example], outputs: ModelOutputs
    ) -> dict[str, Sequence[Any]]:
        """The generated text, whatever answer is in it."""
        return {self.answer_column: [text.strip() for text in outputs.texts]}

    def announcement(self, *, max_new_tokens: int) -> str:
        """How long they may be."""
        return f"free text of at most {max_new_tokens} tokens"
