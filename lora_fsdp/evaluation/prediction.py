"""A finished adapter at work: loaded by PEFT alone, asked in packed sequences, in one process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from peft import PeftModel

from lora_fsdp.adapter.folder import (
    ADAPTER_FILE,
    attach_saved,
    find_base,
    load_with_peft,
    read_adapter_folder,
)
from lora_fsdp.adapter.proof import check_base, read_proof
from lora_fsdp.adapter.saved import load_base_of
from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.fingerprints import fingerprint_base
from lora_fsdp.base.folders import read_json_object, sha256_of_file
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.loading import TOKENIZER_FILES, load_tokenizer
from lora_fsdp.compute.architectures import why_apart, windows_of
from lora_fsdp.compute.fusing import Fusing
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.packing import Packing
from lora_fsdp.errors import AdapterVerificationError, ArgumentError, EmptyTextError
from lora_fsdp.evaluation.calibration import Calibration, answer_sets, read_calibration
from lora_fsdp.evaluation.generation import LEAST_NEW_TOKENS, generate_answers, generate_texts
from lora_fsdp.evaluation.metrics import model_outputs
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.evaluation.scoring import Scores, base_alone, score_examples
from lora_fsdp.placement.packing import choose_packing
from lora_fsdp.sizing.packing import checked_packing
from lora_fsdp.tasks import Example, Task, get_task
from lora_fsdp.tasks.answers import ModelOutputs
from lora_fsdp.tasks.shots import shots_as_json, shots_of_json

TASK_FILE = "task.json"
#: Column with the sets of answers that `--coverage` asks for.
SET_COLUMN = "answer_set"
# Longest packed sequence: on a CPU, attention over long ones costs more than packing saves.
SEQUENCE_TOKENS = {"cuda": 2048, "cpu": 512}


def save_task(
    encoder: Encoder, folder: str | Path, *, max_new_tokens: int, packing: Packing = Packing.PACKED
) -> None:
    """Write how the adapter was prompted beside it, so that it can be asked the same way."""
    contents = {
        "task": encoder.task.name,
        "options": encoder.task.options(),
        "max_length": encoder.max_length,
        "chat_template": encoder.chat_template,
        "chat_template_kwargs": {} if encoder.chat is None else encoder.chat.arguments,
        "thinking": "auto" if encoder.chat is None else encoder.chat.thinking,
        "max_new_tokens": max_new_tokens,
        "examples_share_sequences": not packing.is_apart,
        "few_shot": shots_as_json(encoder.shots),
    }
    write_json(Path(folder) / TASK_FILE, contents)


def read_task(folder: Path) -> dict[str, Any]:
    """What `save_task` wrote.

    Raises:
        AdapterVerificationError: it is missing or damaged; the message names the key.
    """
    if not (folder / TASK_FILE).is_file():
        raise AdapterVerificationError(
            f"{folder} holds no {TASK_FILE}: give the output folder of a finished run, or, of an "
            "adapter that was trained elsewhere, say how it is asked (--task, --labels, "
            "--instruction)."
        )
    # Adapters of 0.1.0 do not say how long their answers may be; all of them were packed. Of a chat
    # template they know no arguments, and their answers follow the prompt at once.
    saved = read_json_object(folder, TASK_FILE)
    former = {
        "max_new_tokens": LEAST_NEW_TOKENS,
        "examples_share_sequences": True,
        "chat_template_kwargs": {},
        "thinking": "none" if saved.get("chat_template") is True else "auto",
        "few_shot": [],
    }
    saved = {**former, **saved}
    kinds = {
        "task": str,
        "options": dict,
        "max_length": int,
        "chat_template": bool,
        "chat_template_kwargs": dict,
        "thinking": str,
        "max_new_tokens": int,
        "examples_share_sequences": bool,
        "few_shot": list,
    }
    for key, kind in kinds.items():
        # A bool is an int to Python.
        if not isinstance(saved.get(key), kind) or (kind is int and saved[key] is True):
            raise AdapterVerificationError(
                f"{folder / TASK_FILE} is damaged: {key} must be {kind.__name__}, not "
                f"{str(saved.get(key))[:80]!r}."
            )
    try:
        shots_of_json(saved["few_shot"])
    except ValueError as error:
        raise AdapterVerificationError(
            f"{folder / TASK_FILE} is damaged: few_shot, {error}."
        ) from error
    return saved


def as_asked(folder: Path, task: Task, *, max_length: int, chat_template: bool) -> dict[str, Any]:
    """In the form of `read_task`, how an adapter is asked that was trained elsewhere.

    Raises:
        ArgumentError: the adapter's folder says it itself.
    """
    if (folder / TASK_FILE).is_file():
        raise ArgumentError(
            f"{folder} says itself how it is asked ({TASK_FILE}): leave out --task, --labels, "
            "--instruction, --task_options, --max_length and --chat_template."
        )
    return {
        "task": task.name,
        "options": task.options(),
        "max_length": max_length,
        "chat_template": chat_template,
        "chat_template_kwargs": {},
        "thinking": "auto",
        "max_new_tokens": max_length // 2,
        "examples_share_sequences": True,
        "few_shot": [],
    }


def read_encoder(
    folder: Path,
    saved: dict[str, Any],
    *,
    tokenizer: ModelArguments | None = None,
    questions: Sequence[str] | None = None,
) -> Encoder:
    """How an adapter is prompted, of what `read_task` gave.

    Args:
        folder: the adapter's.
        saved: how it is asked.
        tokenizer: where the tokenizer is; `None` = in the adapter's folder.
        questions: some of the task's; `None` = all.
    """
    here = ModelArguments(model_name_or_path=str(folder.absolute()))
    task = get_task(saved["task"], saved["options"])
    asked = task if questions is None else task.only(questions)
    return Encoder(
        load_tokenizer(tokenizer or here),
        task=asked,
        max_length=saved["max_length"],
        chat_template=saved["chat_template"],
        chat_template_kwargs=saved["chat_template_kwargs"],
        thinking=saved["thinking"],
        shots=shots_of_json(saved["few_shot"]),
    )


def examples_of_texts(task: Task, texts: Mapping[int, str], *, advice: str) -> list[Example]:
    """Examples of a task that asks about one column, by the rows' numbers.

    Raises:
        ArgumentError: the task needs more than one text; the message ends with `advice`.
    """
    column = str(task.options().get("text_column") or "text")
    try:
        return [
            Example(number, task.build_prompt({column: text}), None, task.build_choices({}))
            for number, text in texts.items()
        ]
    except KeyError as error:
        raise ArgumentError(
            f"Task {task.name!r} asks about more than one column and needs {error}, too: {advice}"
        ) from error


def _fastest(model: PeftModel, *, device: torch.device, longest: int, packs: bool) -> PackedModel:
    """Fuse the layers where they can be, and check the result on the live model.

    Args:
        model: with its adapter, where it computes.
        device: where that is.
        longest: the longest example in tokens.
        packs: whether examples shared sequences when it was trained.
    """
    packed, base = PackedModel(model), base_model(model)
    packed.windows = windows_of(base, longest=longest)
    reason = why_apart(base)
    choice = choose_packing("auto" if packs else "never", why_apart=reason)
    if choice.packing.is_apart:
        packed.fusing = Fusing(reason=choice.reason)
    elif base.config._attn_implementation == "sdpa":
        packed.fuse()
    else:
        packed.fusing = Fusing(reason="attention that is not SDPA")
    packed.shortened_last_layer = True
    checked_packing(packed, choice, device=device)
    return packed


@dataclass(frozen=True)
class Predictor:
    """A task, its encoder, a model with the adapter, where it computes, its longest answer.

    Attributes:
        calibration: of its probabilities (`calibrated`), if the run fitted one.
    """

    task: Task
    encoder: Encoder
    packed: PackedModel
    device: torch.device
    max_new_tokens: int
    calibration: Calibration | None = None

    @property
    def model(self) -> PeftModel:
        """The model with the adapter."""
        return cast(PeftModel, self.packed.model)

    @classmethod
    def from_adapter(
        cls,
        folder: str | Path,
        *,
        base: str | Path | None = None,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        trust_remote_code: bool = False,
        calibrated: bool = True,
        asked: dict[str, Any] | None = None,
        questions: Sequence[str] | None = None,
    ) -> Predictor:
        """Load base, adapter, tokenizer and task from an adapter's folder.

        Args:
            folder: the adapter's.
            base: the base's folder or Hub name, if it is not where the adapter says.
            dtype: in which the base is loaded; auto = bfloat16 on a GPU, float32 on a CPU.
            trust_remote_code: run Python code that comes with the base. No adapter can ask for it.
            calibrated: read the calibration of the probabilities, if there is one.
            asked: how an adapter is asked that was trained elsewhere (`as_asked`); its tokenizer is
                the base's if its folder has none.
            questions: ask only these of a task with several, by their columns; `None` = all.

        Raises:
            ArgumentError: the task has no such question.
            AdapterVerificationError: the folder is not one that this library wrote, or is damaged.
            ModelNotFoundError: the base is not where the adapter says.
            BaseMismatchError: it is another base than the adapter was trained on.
            UnknownTaskError: import the module that registers the task first.
        """
        path = Path(folder)
        saved = read_task(path) if asked is None else asked
        adapter, proof = read_adapter_folder(path), read_proof(path)
        tokenizer = None
        if asked is not None and not any((path / file).exists() for file in TOKENIZER_FILES):
            name, revision = find_base(adapter, given=base, beside=None)
            tokenizer = ModelArguments(name, revision, trust_remote_code=trust_remote_code)
        encoder = read_encoder(path, saved, tokenizer=tokenizer, questions=questions)
        calibration = None
        if calibrated:
            digest = sha256_of_file(path / ADAPTER_FILE)
            calibration = read_calibration(path, encoder.task, adapter_sha256=digest)
        arguments, model, device = load_base_of(
            adapter, proof, given=base, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if proof is not None:
            name = str(arguments.model_name_or_path)
            check_base(proof, fingerprint_base(model), adapter=path, base=name)
        load_with_peft(adapter, model)
        packed = _fastest(
            attach_saved(adapter, model).to(device),
            device=device,
            longest=encoder.max_length,
            packs=saved["examples_share_sequences"],
        )
        longest = saved["max_new_tokens"]
        return cls(encoder.task, encoder, packed, device, longest, calibration)

    def predict(self, texts: Sequence[str]) -> pd.DataFrame:
        """The answers to N texts: a row each, in order, with the columns of `lora-fsdp predict`.

        Raises:
            EmptyTextError: there is nothing in a text; the message gives its number (from 1).
            ArgumentError: the task asks about more than one column (`outputs` takes its examples).
        """
        if isinstance(texts, str):
            raise ArgumentError("Predictor.predict takes a list of texts: give [text].")
        asked = dict(enumerate(texts, start=1))
        empty = next((number for number, text in asked.items() if not str(text).strip()), None)
        if empty is not None:
            raise EmptyTextError(f"Text {empty} of {len(asked)} is empty: leave it out.")
        advice = "make examples of rows (Task.examples) and ask for Predictor.columns."
        examples = examples_of_texts(self.task, asked, advice=advice)
        return pd.DataFrame({name: list(v) for name, v in self.columns(examples).items()})

    def score(self, examples: Sequence[Example] | Sequence[EncodedExample]) -> Scores:
        """Scores of every answer, as during training; `examples` may be encoded already."""
        return score_examples(
            self.packed,
            self.encoder.encode(examples),
            device=self.device,
            max_tokens=SEQUENCE_TOKENS[self.device.type],
        )

    def outputs(self, examples: Sequence[Example] | Sequence[EncodedExample]) -> ModelOutputs:
        """What the answers to `examples` are read from: `score`, and what `write` generates where
        the task's kind of answer asks for it. Without a target there may be nothing to score.
        """
        kind, encoded = self.task.answer_kind, self.encoder.encode(examples)
        texts = self.write(encoded) if kind.generates_text else ()
        if any(ids for one in encoded for ids in one.scored_ids):
            scores, reference = self.score(encoded), None
            if kind.needs_reference:
                with base_alone(self.model):
                    reference = self.score(encoded)
            return model_outputs(encoded, scores, texts=texts, reference=reference)
        nothing = np.zeros((len(encoded), len(kind.labels)))
        return ModelOutputs(nothing, nothing, texts)

    def answers(self, table: pd.DataFrame) -> pd.DataFrame:
        """A copy of `table` with the columns that `lora-fsdp predict` adds.

        Args:
            table: rows with the training table's text columns (`load_table`); each needs a text.

        Raises:
            DataError: a column is missing, or a row has no text.
        """
        examples = self.task.examples(table, with_targets=False)
        return table.assign(**{name: list(v) for name, v in self.columns(examples).items()})

    def columns(
        self, examples: Sequence[Example], *, coverage: float | None = None
    ) -> dict[str, Sequence[Any]]:
        """What `lora-fsdp predict` adds to a table of `examples`, all of which have a text.

        Args:
            examples: the rows.
            coverage: of the column of sets (`answer_sets`), which needs a calibration; `None` = no
                such column.
        """
        outputs = self.calibrated(self.outputs(examples))
        columns = self.task.answer_kind.predicted_columns(examples, outputs)
        if coverage is None or self.calibration is None:
            return columns
        threshold = self.calibration.threshold(coverage)
        sets = answer_sets(self.task, examples, outputs, threshold=threshold)
        return {**columns, SET_COLUMN: [json.dumps(one, ensure_ascii=False) for one in sets]}

    def calibrated(self, outputs: ModelOutputs) -> ModelOutputs:
        """The outputs by which probabilities are right as often as they say, if that is known."""
        return outputs if self.calibration is None else self.calibration.of(outputs)

    def write(
        self,
        examples: Sequence[Example] | Sequence[EncodedExample],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
    ) -> list[str]:
        """The text that the model generates after each prompt.

        Args:
            examples: the prompts; they may be encoded already.
            max_new_tokens: longest answer in tokens; `None` = as in training.
            temperature: of sampling; 0 = greedy, as in evaluation.
        """
        prompts = [encoded.prompt_ids for encoded in self.encoder.encode(examples)]
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        sampled = partial(generate_texts, temperature=temperature)
        generate = generate_answers if temperature == 0 else sampled
        return generate(
            self.model,
            self.encoder.tokenizer,
            prompts,
            device=self.device,
            max_new_tokens=limit,
            end_token_id=self.encoder.end_token_id,
            packing=self.packed.packing_of_prompts,
        )
