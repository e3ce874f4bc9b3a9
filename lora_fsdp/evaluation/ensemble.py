"""Several finished adapters of one task, asked together: one base, the mean of their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel

from lora_fsdp.adapter.folder import (
    AdapterFolder,
    attach_another,
    attach_saved,
    load_with_peft,
    read_adapter_folder,
)
from lora_fsdp.adapter.proof import check_base, read_proof
from lora_fsdp.adapter.saved import load_base_of
from lora_fsdp.base.fingerprints import fingerprint_base
from lora_fsdp.compute.architectures import why_apart as why_sequences_apart
from lora_fsdp.compute.architectures import windows_of
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import why_not_shared
from lora_fsdp.compute.shared_pass import SharedPass, why_apart, why_model_apart
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.packing import PackedSequence
from lora_fsdp.data.sampling import ScoringSequence, ScoringSequences
from lora_fsdp.errors import ArgumentError
from lora_fsdp.evaluation.metrics import model_outputs
from lora_fsdp.evaluation.prediction import SEQUENCE_TOKENS, read_encoder, read_task
from lora_fsdp.evaluation.scoring import Scores, answer_places
from lora_fsdp.placement.packing import choose_packing
from lora_fsdp.sizing.packing import checked_packing
from lora_fsdp.tasks import Example, Task
from lora_fsdp.tasks.answers import ModelOutputs

#: Column with the share of adapters that answer otherwise than all together.
DISAGREEMENT = "disagreement"


def averaged(outputs: Sequence[ModelOutputs]) -> ModelOutputs:
    """What an ensemble gives: the mean of its adapters' probabilities, [N, A]."""
    mean = np.mean([one.probabilities for one in outputs], axis=0)
    with np.errstate(divide="ignore"):
        return ModelOutputs(np.log(mean), outputs[0].tokens)


@dataclass(frozen=True)
class Ensemble:
    """Adapters over one base, in one process.

    Attributes:
        task: of all of them.
        encoders: how each is prompted.
        names: what PEFT calls each.
        packed: the base with all adapters, its layers not fused.
        shared: computes them over one pass; `None` = they cannot share one, and take turns.
        device: where it computes.
    """

    task: Task
    encoders: Sequence[Encoder]
    names: Sequence[str]
    packed: PackedModel
    shared: SharedPass | None
    device: torch.device

    @classmethod
    def from_adapters(
        cls,
        folders: Sequence[str | Path],
        *,
        base: str | Path | None = None,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        trust_remote_code: bool = False,
        questions: Sequence[str] | None = None,
    ) -> Ensemble:
        """Load the base of the first folder's adapter, and the adapters of all.

        Args:
            folders: two or more.
            base, dtype, trust_remote_code, questions: as in `Predictor.from_adapter`.

        Raises:
            ArgumentError: they are not of one task, or its answers are generated texts.
            AdapterVerificationError: a folder is not one that this library wrote, or is damaged.
            BaseMismatchError: they were not trained on one base.
        """
        paths = [Path(folder) for folder in folders]
        if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
            raise ArgumentError(f"An ensemble takes two or more adapters, not {folders}.")
        tasks = _tasks_of(paths)
        encoders = [
            read_encoder(path, task, questions=questions)
            for path, task in zip(paths, tasks, strict=True)
        ]
        if encoders[0].kind.generates_text:
            raise ArgumentError(
                f"The answers of task {encoders[0].task.name!r} are generated texts, which have no "
                "mean: name one adapter."
            )
        adapters = [read_adapter_folder(path) for path in paths]
        arguments, model, device = load_base_of(
            adapters[0],
            read_proof(paths[0]),
            given=base,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        _check_base_of_all(adapters, model, name=str(arguments.model_name_or_path))
        names = ["default", *(f"member{place}" for place in range(1, len(paths)))]
        packed = PackedModel(_attached(adapters, names, model).to(device))
        longest = max(encoder.max_length for encoder in encoders)
        packed.windows = windows_of(packed.base, longest=longest)
        alone = cls(encoders[0].task, encoders, names, packed, None, device)
        packs = all(task["examples_share_sequences"] for task in tasks)
        return alone._sharing([adapter.config for adapter in adapters], packs=packs)

    def _sharing(self, configs: Sequence[LoraConfig], *, packs: bool) -> Ensemble:
        """The same over one pass, where these adapters can share one.

        Args:
            configs: the adapters' settings.
            packs: whether all were trained with examples that share sequences.
        """
        why_apart = why_sequences_apart(self.packed.base)
        choice = choose_packing("auto" if packs else "never", why_apart=why_apart)
        shared = None if choice.packing.is_apart else _shared(self.packed, configs)
        together = replace(self, shared=shared)
        with together.only(self.names[0]):
            checked = checked_packing(self.packed, choice, device=self.device)
        # Examples apart are computed without masks, and by an adapter at a time.
        if shared is None or checked.packing.is_apart:
            return self
        return together if why_not_shared(shared, device=self.device) is None else self

    @property
    def encoder(self) -> Encoder:
        """The first adapter's."""
        return self.encoders[0]

    @property
    def max_new_tokens(self) -> int:
        """0: its answers are not generated."""
        return 0

    @property
    def calibration(self) -> None:
        """None: the mean of calibrated probabilities is not calibrated."""
        return None

    def calibrated(self, outputs: ModelOutputs) -> ModelOutputs:
        """As they are."""
        return outputs

    def columns(
        self, examples: Sequence[Example], *, coverage: float | None = None
    ) -> dict[str, Sequence[Any]]:
        """As `Predictor.columns`, with the share of adapters that answer otherwise.

        There is no calibration, and so there are no sets of a `coverage`.
        """
        kind = self.task.answer_kind
        each = self.outputs_of_each(examples)
        together = averaged(each)
        answers = kind.answers(examples, together)
        others = [kind.answers(examples, one) for one in each]
        differing = [
            sum(other[place] != answer for other in others) / len(others)
            for place, answer in enumerate(answers)
        ]
        return {**kind.predicted_columns(examples, together), DISAGREEMENT: differing}

    def outputs(self, examples: Sequence[Example]) -> ModelOutputs:
        """The mean of the adapters' probabilities."""
        return averaged(self.outputs_of_each(examples))

    def outputs_of_each(self, examples: Sequence[Example]) -> list[ModelOutputs]:
        """What each adapter gives for `examples`, as it would alone."""
        encoded = [encoder.encode(examples) for encoder in self.encoders]
        if not any(ids for one in encoded[0] for ids in one.scored_ids):  # of no rows, for example
            nothing = np.zeros((len(examples), len(self.task.answer_kind.labels)))
            return [ModelOutputs(nothing, nothing) for _ in encoded]
        scores = self._scores(encoded)
        return [model_outputs(own, one) for own, one in zip(encoded, scores, strict=True)]

    def only(self, name: str) -> AbstractContextManager[None]:
        """Within the block, the model computes with one adapter."""
        if self.shared is not None:
            return self.shared.only(name)
        return _active(self.packed.model, name)

    @torch.no_grad()
    def _scores(self, encoded: Sequence[Sequence[EncodedExample]]) -> list[Scores]:
        """Of each adapter, whose examples may be other tokens than those of the others."""
        limit = SEQUENCE_TOKENS[self.device.type]
        packing = self.packed.packing
        sets = [
            ScoringSequences(own, rank=0, world_size=1, max_tokens=limit, packing=packing)
            for own in encoded
        ]
        tallies = [_Tally([len(answers) for answers in one.answers], self.device) for one in sets]
        for turn in range(max(map(len, sets))):
            asked = [place for place, one in enumerate(sets) if turn < len(one)]
            scoring = [sets[place][turn] for place in asked]
            sequences = [one.sequence.to(self.device) for one in scoring]
            found = self._log_probs(sequences, [self.names[place] for place in asked])
            for place, one, sequence, log_probs in zip(
                asked, scoring, sequences, found, strict=True
            ):
                tallies[place].add(one, sequence, log_probs)
        return [tally.scores() for tally in tallies]

    def _log_probs(
        self, sequences: Sequence[PackedSequence], names: Sequence[str]
    ) -> list[torch.Tensor]:
        if self.shared is not None:
            return self.shared.label_log_probs(sequences, names)
        found = []
        for sequence, name in zip(sequences, names, strict=True):
            with _active(self.packed.model, name):
                found.append(self.packed.label_log_probs(sequence))
        return found


class _Tally:
    """Adds label tokens' log-probabilities up to those of answers."""

    def __init__(self, answers: Sequence[int], device: torch.device) -> None:
        self.counts, self.device = torch.tensor(answers, dtype=torch.int64), device
        self.most = max(answers, default=0)
        self.sums = torch.zeros(len(answers) * self.most, device=device)

    def add(
        self, scoring: ScoringSequence, sequence: PackedSequence, log_probs: torch.Tensor
    ) -> None:
        places = answer_places(scoring, counts=self.counts, most=self.most).to(self.device)
        self.sums.index_add_(0, places[sequence.label_answers], log_probs.float())

    def scores(self) -> Scores:
        absent = torch.arange(self.most) >= self.counts[:, None]
        sums = self.sums.cpu().view(len(self.counts), self.most)
        return Scores(sums.masked_fill(absent, -torch.inf))


def _tasks_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What each folder says of its task, which is one of all: otherwise their answers have no mean.

    Raises:
        ArgumentError: names two that differ.
    """
    tasks = [read_task(path) for path in paths]
    for path, other in zip(paths, tasks, strict=True):
        if any(other[key] != tasks[0][key] for key in ("task", "options")):
            raise ArgumentError(
                f"{path} was trained for another task than {paths[0]}, or with another "
                "instruction, column, label or threshold: their answers have no mean."
            )
    return tasks


def _check_base_of_all(adapters: Sequence[AdapterFolder], model: Any, *, name: str) -> None:
    """Refuse an adapter that was trained on another base, or that PEFT cannot load onto it."""
    found = fingerprint_base(model)
    for adapter in adapters:
        if (proof := read_proof(adapter.path)) is not None:
            check_base(proof, found, adapter=adapter.path, base=name)
        load_with_peft(adapter, model)


def _attached(adapters: Sequence[AdapterFolder], names: Sequence[str], model: Any) -> PeftModel:
    adapted = attach_saved(adapters[0], model)
    for adapter, name in zip(adapters[1:], names[1:], strict=True):
        attach_another(adapter, adapted, name=name)
    return adapted.eval()


def _shared(packed: PackedModel, configs: Sequence[LoraConfig]) -> SharedPass | None:
    """One pass for all adapters, where each of them can share it: dropout is off by now."""
    is_sdpa = packed.base.config._attn_implementation == "sdpa"
    at_work = [replace(config, lora_dropout=0.0) for config in configs]
    if not is_sdpa or why_model_apart(packed.base) or any(map(why_apart, at_work)):
        return None
    return SharedPass(packed)


@contextmanager
def _active(model: Any, name: str) -> Iterator[None]:
    """Within the block, PEFT computes with one of several adapters."""
    model.set_adapter(name)
    yield
    model.set_adapter("default")
