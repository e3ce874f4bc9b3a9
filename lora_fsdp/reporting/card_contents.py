"""What a model card says of an adapter, from the files that its run has left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented

from lora_fsdp.evaluation.outputs import TUNED
from lora_fsdp.evaluation.verdict import score_notes
from lora_fsdp.reporting.run_files import RunFiles
from lora_fsdp.reporting.texts import one_line, setting_text

SAMPLE_TEXT = "Thanks for the quick response!"
# As many as `lora-fsdp predict` has an answer of free text.
_NEW_TOKENS = 20
_SHOWN_METRICS = ("accuracy", "macro_f1", "exact_match", "loss")
_LORA = {
    "r": "LoRA rank (r)",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "target_modules": "adapted modules",
    "use_rslora": "rank-stabilised scale",
    "use_dora": "DoRA",
    "bias": "trained biases",
}


def card_contents(
    run: RunFiles, *, adapter: dict[str, Any], step: int | None, with_scores: bool
) -> dict[str, Any]:
    """Everything a card shows.

    Args:
        run: the run that the adapter is of.
        adapter: the adapter's `adapter_config.json`.
        step: of a checkpoint; `None` = the run's final adapter.
        with_scores: whether the run's metrics are this adapter's.
    """
    record = run.record or {}
    asking = record.get("asking") or {}
    finished = with_scores and run.metrics is not None
    model = (record.get("arguments") or {}).get("model") or {}
    contents = {
        "title": run.folder.name if step is None else f"{run.folder.name}, step {step}",
        "task": record.get("task") or (run.task or {}).get("task") or "unknown",
        "labels": run.labels,
        "base": base_facts(adapter),
        "lora": _lora(adapter),
        "step": step,
        "finished": finished,
        "data": _data(run),
        "held_out_rows": record.get("held_out_rows"),
        "is_test": record.get("validation_rows") is not None,
        "notes": score_notes(run.metrics) if finished and run.metrics else [],
        "calibrated": run.metrics.get("calibration") if finished and run.metrics else None,
        "scores": run.metrics["metrics"] if finished and run.metrics else {},
        "metrics": _metric_names(run) if finished else [],
        "verdict": run.scores["verdict"] if finished and run.scores else None,
        "prompt": _shown(asking["prompt"]) if asking.get("prompt") else None,
        "versions": _versions(record.get("environment") or {}),
        "sample_text": SAMPLE_TEXT,
    }
    return contents | _asking(asking, trust_remote_code=bool(model.get("trust_remote_code")))


def _asking(asking: dict[str, Any], *, trust_remote_code: bool) -> dict[str, Any]:
    pieces = [str(piece) for piece in asking.get("prompt") or [""]]
    names = list(dict.fromkeys(pieces[1::2]))
    choices = [[str(piece) for piece in choice] for choice in asking.get("choices") or []]
    return {
        "takes_one_text": names == ["text"] and not choices,
        "row": _sample_row(asking.get("row")),
        "values": {name: _sample(name) for name in names},
        "pieces": _source(pieces),
        "choices": [", ".join(_source(choice)) for choice in choices],
        "after": str(asking.get("after", "")),
        "frames": asking.get("frames", 1),
        "leading_ids": [int(token) for token in asking.get("leading_ids", ())],
        "answers": {
            str(label): [int(token) for token in ids]
            for label, ids in (asking.get("answers") or {}).items()
        },
        "reading": str(asking.get("reading") or ""),
        "end_token_id": int(asking.get("end_token_id", 0)),
        "max_length": int(asking.get("max_length", 0)),
        "max_new_tokens": _NEW_TOKENS,
        "trust_remote_code": trust_remote_code,
    }


def _shown(pieces: list[str]) -> str:
    """A prompt with the names of its variables in braces."""
    return "".join(f"{{{piece}}}" if i % 2 else str(piece) for i, piece in enumerate(pieces))


def _source(pieces: list[str]) -> list[str]:
    """Expressions of Python's that joined are the text: each of its lines, and each variable."""
    found: list[str] = []
    for place, piece in enumerate(pieces):
        if place % 2 and not piece.isidentifier():  # it would be code in the reader's hands
            raise ValueError(f"{piece!r} is no name of a variable")
        found += [piece] if place % 2 else [repr(line) for line in piece.splitlines(keepends=True)]
    return found


def _sample(name: str) -> str:
    return SAMPLE_TEXT if name == "text" else f"a {name.replace('_', ' ').strip()}"


def _sample_row(row: Any) -> Any:
    """A row of the task's, with samples in the place of the names in braces."""
    if isinstance(row, dict):
        return {str(column): _sample_row(cell) for column, cell in row.items()}
    if isinstance(row, list):
        return [_sample_row(cell) for cell in row]
    if isinstance(row, str) and row.startswith("{") and row.endswith("}"):
        return _sample(row[1:-1])
    return row


def base_facts(adapter: dict[str, Any]) -> dict[str, Any]:
    """The base's name on the Hub, or its folder's name; never where on a machine that lies."""
    name = str(adapter.get("base_model_name_or_path") or "unknown")
    try:
        validate_repo_id(name)
        return {"name": name, "is_local": False}
    except HFValidationError:
        return {"name": Path(name).name or "unknown", "is_local": True}


def card_header(contents: dict[str, Any], *, data_name: str) -> str:
    """The card's metadata as YAML, with PEFT's keys and tags."""
    base = one_line(contents["base"]["name"], limit=96)
    tuned = contents["scores"].get(TUNED, {})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="table",
            dataset_name=one_line(data_name, limit=96),
            metric_type=name,
            metric_value=tuned[name],
        )
        for name in contents["metrics"]
        if name in tuned
    ]
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[f"base_model:adapter:{base}", "lora", "lora-fsdp", "transformers"],
        model_name=one_line(contents["title"], limit=96),
        eval_results=results or None,
    )
    return str(data.to_yaml())


def data_name(run: RunFiles) -> str:
    """Name of the table, without where it lies."""
    arguments = (run.record or {}).get("arguments") or {}
    name = (arguments.get("data") or {}).get("data_file")
    names = [Path(one).name for one in str(name).split(os.pathsep)] if name else []
    return ", ".join(names) or "the task's own rows"


def _data(run: RunFiles) -> dict[str, Any]:
    record = run.record or {}
    digests = record.get("data_sha256") or {}
    arguments = (record.get("arguments") or {}).get("data") or {}
    is_test = record.get("validation_rows") is not None
    facts = {
        "source": data_name(run),
        "SHA-256 of the source": digests.get("data_file"),
        "held-out source": Path(str(arguments["eval_file"])).name
        if arguments.get("eval_file")
        else None,
        "SHA-256 of the held-out source": digests.get("eval_file"),
        "test source": Path(str(arguments["test_file"])).name
        if arguments.get("test_file")
        else None,
        "SHA-256 of the test source": digests.get("test_file"),
        "training rows": record.get("training_rows"),
        "held-out rows": None if is_test else record.get("held_out_rows"),
        "validation rows": record.get("validation_rows"),
        "test rows": record.get("held_out_rows") if is_test else None,
        "split": "; ".join(map(str, record.get("splits") or ())) or None,
        "rows that every prompt shows, not trained on": ", ".join(
            map(str, record.get("shown_rows") or ())
        )
        or None,
        "rows left out": record.get("rows_left_out"),
        "sample": f"{arguments['max_rows']} rows at random" if arguments.get("max_rows") else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _lora(adapter: dict[str, Any]) -> dict[str, str]:
    shown = {}
    for key, name in _LORA.items():
        value = adapter.get(key)
        if value is None or value is False or value == "none":
            continue
        listed = sorted(map(str, value)) if isinstance(value, list) else None
        shown[name] = ", ".join(listed) if listed is not None else setting_text(value)
    return shown


def _metric_names(run: RunFiles) -> list[str]:
    """The metric that decides first."""
    metrics = run.metrics or {}
    tuned = metrics["metrics"][TUNED]
    names = dict.fromkeys([str(metrics["primary_metric"]), *_SHOWN_METRICS])
    return [name for name in names if name in tuned]


def _versions(environment: dict[str, Any]) -> dict[str, str]:
    if not environment:
        return {}
    packages = environment.get("packages") or {}
    versions = {"lora_fsdp": environment.get("lora_fsdp"), "python": environment.get("python")}
    return {name: str(version) for name, version in (versions | packages).items() if version}
