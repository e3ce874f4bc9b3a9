"""Where the time of a run went, and what of it was predicted."""

from __future__ import annotations

from typing import Any

from lora_fsdp.reporting.run_files import RunFiles

#: What each part is, in the order in which a run comes to them.
_PARTS = {
    "start": "from the command to the run: processes, imports",
    "read": "rows, tokens, weights, and checks of the model",
    "score": "the untrained model, the baselines, and the tuned model after training",
    "capture": "CUDA graphs of the step",
    "train": "optimizer steps",
    "evaluate": "held-out rows while training",
    "save": "checkpoints and the adapter, read back",
    "report": "data health, metrics, cards and this page",
    "other": "what none of these accounts for",
}


def spent(run: RunFiles) -> dict[str, Any] | None:
    """Seconds by part, JSON-ready; `None` if the run did not note them.

    They add up to `total`. Of a part that was predicted, `predicted` says how many seconds.
    """
    metrics = run.metrics or {}
    measured = metrics.get("seconds_by_part")
    if not measured:
        return None
    total = sum(float(seconds) for seconds in measured.values())
    predicted = (metrics.get("plan") or {}).get("seconds_by_part") or {}
    parts = [
        {
            "part": part,
            "what": what,
            "seconds": float(measured.get(part, 0.0)),
            "share": float(measured.get(part, 0.0)) / total if total else 0.0,
            "predicted": None if predicted.get(part) is None else float(predicted[part]),
        }
        for part, what in _PARTS.items()
    ]
    return {"total": total, "parts": [one for one in parts if one["seconds"] or one["predicted"]]}
