"""Answers to several questions: each question by itself, and its most confident mistakes."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from lora_fsdp.evaluation.verdict import columns_after
from lora_fsdp.reporting.texts import one_line
from lora_fsdp.tasks.answers.questions import ANSWER_TO, CERTAINTY_OF

_MISTAKES = 10


def questions_section(predictions: pd.DataFrame) -> dict[str, Any]:
    """Every question's share of right answers, and where it was sure and wrong, JSON-ready."""
    right = [json.loads(target) for target in predictions["target"]]
    lines, mistakes = [], []
    for name, column in columns_after(ANSWER_TO, predictions).items():
        given = predictions[column].tolist()
        certain = predictions[f"{CERTAINTY_OF}{name}"].astype(float).tolist()
        known = [place for place, answers in enumerate(right) if name in answers]
        wrong = [place for place in known if right[place][name] != given[place]]
        lines.append(
            {
                "question": one_line(name, limit=80),
                "rows": len(known),
                "right": len(known) - len(wrong),
                "accuracy": 1 - len(wrong) / len(known) if known else None,
                "certainty": sum(certain[place] for place in known) / len(known) if known else None,
            }
        )
        mistakes += [
            {
                "row": int(predictions["row"].iloc[place]),
                "text": one_line(predictions["text"].iloc[place], limit=200),
                "question": one_line(name, limit=80),
                "target": one_line(right[place][name], limit=80),
                "tuned": one_line(given[place], limit=80),
                "certainty": certain[place],
            }
            for place in wrong
        ]
    mistakes.sort(key=lambda line: -line["certainty"])
    return {"rows": len(predictions), "by_question": lines, "mistakes": mistakes[:_MISTAKES]}
