"""Summaries, measured by ROUGE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Self

import pandas as pd

from lora_fsdp.errors import MissingPackageError
from lora_fsdp.tasks.generation import GenerationTask
from lora_fsdp.tasks.registry import register_task
from lora_fsdp.tasks.text_metrics import space_ideographs

_KINDS = ("rouge1", "rouge2", "rougeL")


@register_task
class SummarisationTask(GenerationTask):
    """A summary of a text; the metrics are F1 of ROUGE-1, ROUGE-2 and ROUGE-L.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), as computed by
    Google's `rouge-score` with stemming (`pip install 'lora-fsdp[rouge]'`).
    """

    name = "summarisation"
    description = "A summary of each text, measured by ROUGE"
    primary_metric = "rougeL"
    instruction = "Summarise the following text in one sentence."
    label_column = "summary"

    def bind(
        self, table: pd.DataFrame, *, with_labels: bool = True, for_training: bool = True
    ) -> Self:
        """See the base class.

        Raises:
            MissingPackageError: there is no `rouge-score` to measure with.
        """
        if with_labels:
            rouge_scorer()
        return super().bind(table, with_labels=with_labels, for_training=for_training)

    def score_answer(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """ROUGE against the reference that is nearest by each kind."""
        scores = rouge_scorer().score_multi(list(references), answer)
        return {kind: float(scores[kind].fmeasure) for kind in _KINDS}


@cache
def rouge_scorer() -> Any:
    """The library's scorer, with words of every script and not only of English."""
    try:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingPackageError(
            f"Summaries are measured by rouge-score, which cannot be imported ({error}): "
            "pip install 'lora-fsdp[rouge]'."
        ) from error

    class Words:
        """The library's own tokenizer drops every letter but a to z."""

        stem = PorterStemmer().stem

        def tokenize(self, text: str) -> list[str]:
            found = re.findall(r"[^\W_]+", space_ideographs(text.lower()))
            return [self.stem(word) if len(word) > 3 else word for word in found]

    return RougeScorer(_KINDS, tokenizer=Words())
