"""How to load, serve and resume: lines that run as they are."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from lora_fsdp.reporting.run_files import RunFiles

_LOAD = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, folder)

# The prompt of held-out row {row}, as in training.
prompt = {prompt}
inputs = tokenizer(prompt, return_tensors="pt"{special})
output = model.generate(
    **inputs,
    max_new_tokens={new_tokens},
    do_sample=False,
    eos_token_id={end},
    pad_token_id=tokenizer.pad_token_id,
)
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip())
"""

_PREDICT = """\
import pandas as pd

from lora_fsdp.evaluation.prediction import Predictor

predictor = Predictor.from_adapter({folder!r})
table = pd.DataFrame({{{column!r}: [{text!r}]}})
scores = predictor.score(predictor.task.examples(table, with_targets=False))
for best, probabilities in zip(scores.best, scores.probabilities.tolist(), strict=True):
    print(predictor.task.labels[best], f"{{probabilities[best]:.3f}}")
"""


_PREDICT_KIND = """\
import pandas as pd

from lora_fsdp.evaluation.prediction import Predictor

predictor = Predictor.from_adapter({folder!r})
table = pd.DataFrame({{{column!r}: [{text!r}]}})
examples = predictor.task.examples(table, with_targets=False)
kind = predictor.task.answer_kind
answers = pd.DataFrame(kind.predicted_columns(examples, predictor.outputs(examples)))
print(answers.iloc[0].to_string())
"""


def usage(run: RunFiles) -> dict[str, Any]:
    """Snippets and commands as text; `None` for what this run has nothing to offer for."""
    return {"load": _load(run), "predict": _predict(run), "serve": _serve(run)} | _resume(run)


def _load(run: RunFiles) -> str | None:
    prompt = (run.record or {}).get("prompt")
    if run.adapter is None or prompt is None:
        return None
    return _LOAD.format(
        folder=str(run.folder),
        base=base_of(run),
        row=prompt["row"],
        prompt=_literal(str(prompt["rendered"])),
        # A chat template has the special tokens in it.
        special=", add_special_tokens=False" if prompt["chat_template"] else "",
        new_tokens=max(int(prompt["longest_answer_tokens"]), 1),
        end=int(prompt["end_token_id"]),
    )


def _literal(text: str) -> str:
    """`text` as Python source, each of its lines on a line."""
    lines = "".join(f"    {line!r}\n" for line in text.splitlines(keepends=True))
    return f"(\n{lines})"


def _predict(run: RunFiles) -> str | None:
    options = (run.task or {}).get("options") or {}
    prompt = (run.record or {}).get("prompt")
    reading = ((run.record or {}).get("asking") or {}).get("reading")
    if run.adapter is None or not options.get("text_column"):
        return None
    if not options.get("labels") and not reading:
        return None
    # A row of one text is no row of a task that asks about more columns.
    if {name for name in options if name.endswith("_column")} - {"text_column", "label_column"}:
        return None
    text = "A text to classify." if prompt is None else prompt["text"]
    snippet = _PREDICT_KIND if reading else _PREDICT
    return snippet.format(folder=str(run.folder), column=options["text_column"], text=text)


def _serve(run: RunFiles) -> str | None:
    if run.adapter is None:
        return None
    name = shlex.quote(f"{run.folder.name}={run.folder}")
    return (
        f"vllm serve {shlex.quote(base_of(run))} --enable-lora \\\n"
        f"    --max-lora-rank {_vllm_rank(int(run.adapter['r']))} --lora-modules {name}"
    )


def _vllm_rank(rank: int) -> int:
    """The smallest limit that vLLM offers for adapters of this rank."""
    return next((limit for limit in (8, 16, 32, 64, 128, 256, 320, 512) if limit >= rank), rank)


def _resume(run: RunFiles) -> dict[str, Any]:
    command = (run.record or {}).get("command")
    if not run.checkpoints:
        return {"resume": None, "checkpoint": None}
    resumed = None
    if command:
        folder = shlex.quote(str(run.record["working_directory"]))  # type: ignore[index]
        words = [*command, "--resume_from_checkpoint", "true"]
        resumed = f"cd {folder}\n{_one_option_a_line(words)}"
    return {"resume": resumed, "checkpoint": run.checkpoints[-1]}


def _one_option_a_line(command: list[str]) -> str:
    words = (
        f"\\\n    {shlex.quote(word)}" if word.startswith("--") else shlex.quote(word)
        for word in command
    )
    return " ".join(words)


def base_of(run: RunFiles) -> str:
    """The base model's name, or its folder, absolute if the run knew it by a relative path."""
    name = str((run.adapter or {}).get("base_model_name_or_path") or "")
    if not name and run.record is not None:
        name = str(run.record["arguments"]["model"]["model_name_or_path"])
    if run.record is not None:
        folder = Path(str(run.record["working_directory"]), name)
        if folder.is_dir():
            return str(folder)
    return name
