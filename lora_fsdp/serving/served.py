"""The adapter that is served, under its name."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from lora_fsdp.data.encoding import Encoder
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.ensemble import Ensemble
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.tasks import Example, Task


@dataclass(frozen=True)
class Served:
    """An adapter, or several that answer together.

    Attributes:
        predictor: used by the scoring thread alone.
        name: by which requests ask for it.
    """

    predictor: Predictor | Ensemble
    name: str
    # A tokenizer keeps state between calls, and the scoring thread uses the predictor's.
    _encoder: Encoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_encoder", copy.deepcopy(self.predictor.encoder))

    @property
    def task(self) -> Task:
        """What it was trained for."""
        return self.predictor.task

    @property
    def longest_text(self) -> int:
        """The longest generated answer in tokens."""
        return self.predictor.max_new_tokens

    def check(self) -> None:
        """Refuse an adapter whose answers cannot be given, before anybody asks.

        Raises:
            ArgumentError: its kind of answer has no columns.
        """
        kind = self.task.answer_kind
        if kind.answer_column not in self.predictor.columns([]):
            raise ArgumentError(
                f"The answers of task {self.task.name!r} ({kind.name}) have no column for the "
                "answer, so they cannot be served: ask the adapter in Python."
            )

    def prompt_tokens(self, example: Example) -> int:
        """Of the prompt as the model gets it."""
        [encoded] = self._encoder.encode([example])
        return len(encoded.prompt_ids)

    def answer_tokens(self, text: str) -> int:
        """Of an answer, without the end token."""
        return len(self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
