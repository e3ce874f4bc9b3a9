"""`lm_eval.yaml` beside an adapter: the run as a task of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from lora_fsdp.evaluation.outputs import write_text
from lora_fsdp.reporting.run_files import PREDICTIONS_FILE, RECORD_FILE, RunFiles, read_run

logger = logging.getLogger(__name__)

HARNESS_FILE = "lm_eval.yaml"
_HEAD = """\
# A task of lm-evaluation-harness: the held-out rows of this run, each label scored by likelihood.
# In this folder: lm_eval run --model hf --tasks lm_eval.yaml \\
#     --model_args pretrained=BASE,peft=.{bos}
# A text that the run shortened to {length} tokens is not shortened there.
"""


def write_harness_task(folder: Path) -> Path | None:
    """Write the file into the folder of a finished run.

    Returns:
        its path; `None` for a task that asks otherwise (free text, several columns or questions),
        and for a tokenizer with which the harness would not score the tokens that were trained.
    """
    run = read_run(folder)
    asking = (run.record or {}).get("asking") or {}
    pieces, answers = asking.get("prompt"), asking.get("answers")
    fits = not (asking.get("choices") or asking.get("reading")) and asking.get("frames", 1) == 1
    if not (pieces and answers and fits and run.predictions is not None):
        return None
    if set(pieces[1::2]) != {"text"}:
        return None
    choices = _choices(folder, pieces, answers, end=int(asking["end_token_id"]))
    if choices is None:
        return None
    text = run.part(RECORD_FILE, lambda run: _task(run, asking, choices))
    path = folder / HARNESS_FILE
    write_text(path, text)
    return path


def try_to_write_harness_task(folder: Path) -> None:
    """As `write_harness_task`; what goes wrong is said and ends nothing: the run is saved."""
    try:
        write_harness_task(folder)
    except Exception as error:  # whatever it is, it must not turn a saved run into a failed one
        logger.error("%s was not written (%s: %s).", HARNESS_FILE, type(error).__name__, error)


def _choices(
    folder: Path, pieces: list[str], answers: dict[str, list[int]], *, end: int
) -> dict[str, str] | None:
    """Each label's answer as text that the harness splits into the tokens that were trained."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = "".join("a text" if place % 2 else piece for place, piece in enumerate(pieces))
    before: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    found = {}
    for label, ids in answers.items():
        whole = ids if ids[-1] == end else [*ids, end]
        found[label] = tokenizer.decode(whole)
        if (
            tokenizer(prompt + found[label], add_special_tokens=False)["input_ids"]
            != before + whole
        ):
            return None
    return found


def _task(run: RunFiles, asking: dict[str, Any], choices: dict[str, str]) -> str:
    """The YAML; in its templates nothing of the prompt is read as Jinja's own."""
    pieces = asking["prompt"]
    template = "".join(
        "{{text}}" if place % 2 else "{{ " + repr(piece) + " }}"
        for place, piece in enumerate(pieces)
        if piece
    )
    labels = list(choices)
    task = {
        "task": f"lora_fsdp_{(run.record or {})['task']}",
        "dataset_path": "csv",
        "dataset_kwargs": {"data_files": {"test": PREDICTIONS_FILE}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": template,
        "target_delimiter": "",
        "doc_to_choice": list(choices.values()),
        "doc_to_target": "{{ " + repr(labels) + ".index(target|string) }}",
        "metric_list": [{"metric": "acc"}],
    }
    head = _HEAD.format(
        bos=",add_bos_token=True" if asking.get("leading_ids") else "",
        length=asking.get("max_length", 0),
    )
    return head + yaml.safe_dump(task, sort_keys=False, allow_unicode=True, width=1000)
