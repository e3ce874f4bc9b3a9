"""Facts out of a text, as a JSON object."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_fsdp.tasks.cells import cell_value, json_text
from lora_fsdp.tasks.generation import GenerationTask
from lora_fsdp.tasks.registry import register_task

# A block of code in a text in Markdown, as chat models write JSON.
_FENCE = re.compile(r"```[ \t]*(?:json[c5l]?)?[ \t]*\r?\n(.*)", flags=re.IGNORECASE | re.DOTALL)
# Objects in objects; a model that repeats "{" would end in a RecursionError.
_MOST_LEVELS = 100


@register_task
class ExtractionTask(GenerationTask):
    """A JSON object with what a text says; the answer column holds such objects."""

    name = "extraction"
    description = "A JSON object with the facts in each text"
    primary_metric = "field_f1"
    instruction = "Extract the facts from the following text as a JSON object."
    label_column = "fields"

    def fault(self, row: Mapping[str, Any], *, with_labels: bool) -> str | None:
        """An answer that is no JSON object."""
        found = super().fault(row, with_labels=with_labels)
        if found is None and with_labels:
            fields = self._fields(row)
            if not isinstance(fields, dict):
                return f"column {self.label_column!r} holds no JSON object"
            if _is_deep(fields):
                return f"column {self.label_column!r} is nested deeper than {_MOST_LEVELS} levels"
        return found

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The object in one line, its keys in the row's order."""
        return f" {json_text(self._fields(row))}"

    def parse(self, text: str) -> str | None:
        """The JSON object that the text, or a fenced block in it, begins with; in one line.

        `None` if there is none, or one that is nested deeper than 100 levels.
        """
        fenced = _FENCE.search(text)
        begins = [text, fenced[1]] if fenced else [text]
        for begin in begins:
            try:
                found, _ = json.JSONDecoder().raw_decode(begin.strip())
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict) and not _is_deep(found):
                return json.dumps(found, ensure_ascii=False)
        return None

    def score_answer(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """`valid_json` and `whole_object`, 1 or 0; `field_f1`, whose mean is over all fields.

        A field is a value with the path to it; both must be right. The entries of a list are paired
        so that most fields agree: their order does not matter, and each is compared as a whole.
        """
        given, right = json.loads(answer or "{}"), json.loads(references[0])
        shared, fields = _shared(given, right), _count(given) + _count(right)
        valid = float(answer != "")
        return {
            "field_f1": 2 * shared / fields if fields else valid,
            "valid_json": valid,
            "whole_object": float(valid and 2 * shared == fields),
        }

    def weigh_answer(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """A row counts by its fields, those given and those to be given."""
        fields = _count(json.loads(answer or "{}")) + _count(json.loads(references[0]))
        return {"field_f1": float(fields)}

    def _fields(self, row: Mapping[str, Any]) -> Any:
        return cell_value(row[self.label_column])


def _is_deep(value: Any) -> bool:
    """Whether `value` holds objects or lists in more levels than may be."""
    held = [value]
    for _ in range(_MOST_LEVELS):
        held = [
            entry
            for one in held
            if isinstance(one, dict | list)
            for entry in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, dict | list) for one in held)


def _count(value: Any, *, is_whole: bool = True) -> int:
    """How many fields `value` has; an empty object or list within it is one."""
    if isinstance(value, dict | list) and value:
        entries = value.values() if isinstance(value, dict) else value
        return sum(_count(entry, is_whole=False) for entry in entries)
    return 0 if is_whole and value == {} else 1


def _shared(given: Any, right: Any, *, is_whole: bool = True) -> int:
    """How many fields both have."""
    if isinstance(given, dict) and isinstance(right, dict) and given and right:
        common = given.keys() & right.keys()
        return sum(_shared(given[key], right[key], is_whole=False) for key in common)
    if isinstance(given, list) and isinstance(right, list) and given and right:
        return _shared_entries(given, right)
    return int(_is_same(given, right) and not is_whole)


def _shared_entries(given: list[Any], right: list[Any]) -> int:
    """As many fields as the best pairing of entries shares."""
    if not any(isinstance(entry, dict | list) for entry in (*given, *right)):
        # A bool is an int to Python.
        counts = [
            Counter((isinstance(entry, bool), entry) for entry in entries)
            for entries in (given, right)
        ]
        return (counts[0] & counts[1]).total()
    # Imported here, because scipy.optimize takes longer to import than everything else here.
    from scipy.optimize import linear_sum_assignment

    shared = np.array([[_shared(a, b, is_whole=False) for b in right] for a in given])
    return int(shared[linear_sum_assignment(shared, maximize=True)].sum())


def _is_same(given: Any, right: Any) -> bool:
    """Whether two values are one: 2 and 2.0 are, 1 and true are not."""
    return isinstance(given, bool) == isinstance(right, bool) and given == right
