"""A finished adapter at work: loaded by PEFT alone, asked in packed rows, in one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.errors import AdapterVerificationError
from lora_fsdp.evaluation.generation import generate_texts
from lora_fsdp.evaluation.report import write_json
from lora_fsdp.evaluation.scoring import Scores, score_examples
from lora_fsdp.modeling.adapters import base_model
from lora_fsdp.modeling.loading import load_base, load_tokenizer
from lora_fsdp.tasks import Example, Task, get_task

TASK_FILE = "task.json"
# Longest packed row: on a CPU, attention over long rows costs more than packing saves.
_ROW_TOKENS = {"cuda": 2048, "cpu": 512}


def save_task(encoder: Encoder, folder: str | Path) -> None:
    """Write how the adapter was prompted beside it, so that it can be asked the same way."""
    contents = {
        "task": encoder.task.name,
        "options": encoder.task.options(),
        "max_length": encoder.max_length,
        "chat_template": encoder.chat_template,
    }
    write_json(Path(folder) / TASK_FILE, contents)


@dataclass(frozen=True)
class Predictor:
    """A task, its encoder and a model with the adapter."""

    task: Task
    encoder: Encoder
    model: PeftModel
    device: torch.device

    @classmethod
    def from_adapter(cls, folder: str | Path, *, dtype: str = "auto") -> Predictor:
        """Load base, adapter, tokenizer and task from an adapter's folder.

        Raises:
            AdapterVerificationError: the folder is not one that this library wrote.
            UnknownTaskError: import the module that registers the task first.
        """
        folder = Path(folder)
        if not (folder / TASK_FILE).is_file():
            raise AdapterVerificationError(
                f"{folder} holds no {TASK_FILE}: give the output folder of a finished run."
            )
        saved = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base_name = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
        arguments = ModelArguments(model_name_or_path=base_name, dtype=dtype)  # type: ignore[arg-type]
        base = load_base(arguments, device=device)
        model = PeftModel.from_pretrained(base, str(folder)).to(device).eval()
        task = get_task(saved["task"], saved["options"])
        encoder = Encoder(
            load_tokenizer(ModelArguments(model_name_or_path=str(folder.absolute()))),
            task=task,
            max_length=saved["max_length"],
            chat_template=saved["chat_template"],
        )
        return cls(task, encoder, model, device)

    def score(self, examples: Sequence[Example]) -> Scores:
        """Scores of every answer, as during training."""
        return score_examples(
            self.model,
            self.encoder.encode(examples),
            device=self.device,
            dtype=base_model(self.model).dtype,
            max_tokens=_ROW_TOKENS[self.device.type],
        )

    def write(
        self, examples: Sequence[Example], *, max_new_tokens: int = 20, temperature: float = 0.0
    ) -> list[str]:
        """What the model writes by itself after each prompt."""
        return generate_texts(
            self.model,
            self.encoder.tokenizer,
            [encoded.prompt_ids for encoded in self.encoder.encode(examples)],
            device=self.device,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            end_token_id=self.encoder.end_token_id,
        )
