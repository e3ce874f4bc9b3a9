"""Facts out of a text, as a JSON object."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_fsdp.tasks.cells import cell_value
from lora_fsdp.tasks.generation import GenerationTask
from lora_fsdp.tasks.registry import register_task


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
        if found is None and with_labels and not isinstance(self._fields(row), dict):
            return f"column {self.label_column!r} holds no JSON object"
        return found

    def build_target(self, row: Mapping[str, Any]) -> str:
        """The object in one line, its keys in the row's order."""
        return f" {json.dumps(self._fields(row), ensure_ascii=False)}"

    def parse(self, text: str) -> str | None:
        """The JSON object that the text begins with, in one line; `None` if there is none."""
        try:
            found, _ = json.JSONDecoder().raw_decode(text.strip())
        except (ValueError, RecursionError):
            return None
        return json.dumps(found, ensure_ascii=False) if isinstance(found, dict) else None

    def score_answer(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """`valid_json` and `whole_object`, 1 or 0; `field_f1`, whose mean is over all fields.

        A field is a value with the path to it; both must be right.
        """
        given, right = _fields_of(answer or "{}"), _fields_of(references[0])
        fields = given.total() + right.total()
        valid = float(answer != "")
        return {
            "field_f1": 2 * (given & right).total() / fields if fields else valid,
            "valid_json": valid,
            "whole_object": float(valid and given == right),
        }

    def weigh_answer(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """A row counts by its fields, those given and those to be given."""
        given, right = _fields_of(answer or "{}"), _fields_of(references[0])
        return {"field_f1": float(given.total() + right.total())}

    def _fields(self, row: Mapping[str, Any]) -> Any:
        return cell_value(row[self.label_column])


def _fields_of(text: str) -> Counter[tuple[str, str]]:
    return Counter(_leaves(json.loads(text)))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, value as JSON) of all that `value` holds; the order of a list does not matter."""
    if isinstance(value, dict | list) and value:
        entries = value.items() if isinstance(value, dict) else (("[]", entry) for entry in value)
        for key, entry in entries:
            yield from _leaves(entry, f"{path}/{key}")
    elif value != {} or path:
        yield path, json.dumps(value)
