"""What a trainer's model answers, under its placement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader

from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.sampling import ScoringSequence, ScoringSequences
from lora_fsdp.distributed.sharding import release_gathered
from lora_fsdp.evaluation.generation import generate_answers, generate_texts
from lora_fsdp.evaluation.metrics import model_outputs
from lora_fsdp.evaluation.probing import MeanStates
from lora_fsdp.evaluation.scoring import Scores, base_alone, score_sequences
from lora_fsdp.evaluation.untrained import ways_of_reading
from lora_fsdp.tasks.answers import ModelOutputs


@dataclass(frozen=True, kw_only=True)
class RunScorer:
    """Scores answers and generates text. Every method is a collective call.

    Attributes:
        model: placed, with its adapter.
        packed: it, as it computes packed sequences.
        encoder: of the examples.
        device: where it computes.
        autocast: the context of the forward.
        max_new_tokens: of the longest text that is generated.
    """

    model: PeftModel
    packed: PackedModel
    encoder: Encoder
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    max_new_tokens: int

    def score(
        self,
        sequences: DataLoader[ScoringSequence],
        *,
        after_sequence: Callable[[], None] | None = None,
        states: MeanStates | None = None,
    ) -> Scores:
        """Scores of every answer; `after_sequence` is called after each of them."""
        answers = cast(ScoringSequences, sequences.dataset).answers
        with self.autocast():
            scores = score_sequences(
                self.packed,
                sequences,
                answers=[len(one) for one in answers],
                device=self.device,
                after_sequence=after_sequence,
                states=states,
            )
        release_gathered(self.model)
        return scores

    def generate(self, examples: Sequence[EncodedExample]) -> list[str]:
        """The text that greedy decoding generates after each prompt."""
        return self._texts(generate_answers, examples)

    def sample(self, examples: Sequence[EncodedExample], *, temperature: float) -> list[str]:
        """The text that the model generates after each prompt at a temperature; 0 = greedily."""
        return self._texts(partial(generate_texts, temperature=temperature), examples)

    def _texts(
        self, generator: Callable[..., list[str]], examples: Sequence[EncodedExample]
    ) -> list[str]:
        texts = generator(
            self.model,
            self.encoder.tokenizer,
            [example.prompt_ids for example in examples],
            device=self.device,
            max_new_tokens=self.max_new_tokens,
            end_token_id=self.encoder.end_token_id,
            packing=self.packed.packing_of_prompts,
        )
        release_gathered(self.model)
        return texts

    def outputs(
        self,
        sequences: DataLoader[ScoringSequence],
        *,
        after_sequence: Callable[[], None] | None = None,
    ) -> ModelOutputs:
        """Scores, and generated texts where the kind of answer asks for them."""
        examples = cast(ScoringSequences, sequences.dataset).examples
        scores = self.score(sequences, after_sequence=after_sequence)
        kind, reference = self.encoder.kind, None
        if kind.needs_reference:
            with base_alone(self.model):
                reference = self.score(sequences)
        texts = self.generate(examples) if kind.generates_text else ()
        return model_outputs(examples, scores, texts=texts, reference=reference)

    def untrained(
        self, sequences: DataLoader[ScoringSequence], *, skip: int | None = None
    ) -> tuple[dict[str, ModelOutputs], np.ndarray | None]:
        """The outputs without the adapter, in each way of reading them (`ways_of_reading`).

        Args:
            sequences: as for `outputs`.
            skip: tokens that the probe leaves out of each prompt; `None` = no probe.

        Returns:
            the ways, and [N, H] features of the same forwards, if the model shows its states.
        """
        examples = cast(ScoringSequences, sequences.dataset).examples
        with self.model.disable_adapter():
            scores, features = self._with_features(sequences, skip=skip)
            texts = self.generate(examples) if self.encoder.kind.generates_text else ()
        reference = scores if self.encoder.kind.needs_reference else None
        outputs = model_outputs(examples, scores, texts=texts, reference=reference)
        return ways_of_reading(self.encoder.task, outputs, scores), features

    def features(self, sequences: DataLoader[ScoringSequence], *, skip: int) -> np.ndarray | None:
        """[N, H] features of the examples' prompts without the adapter."""
        with self.model.disable_adapter():
            return self._with_features(sequences, skip=skip)[1]

    def _with_features(
        self, sequences: DataLoader[ScoringSequence], *, skip: int | None
    ) -> tuple[Scores, np.ndarray | None]:
        if skip is None:
            return self.score(sequences), None
        count = len(cast(ScoringSequences, sequences.dataset).examples)
        with MeanStates(self.packed, count, skip) as states:
            scores = self.score(sequences, states=states)
        return scores, states.features(device=self.device)
