"""Bodies of requests, from bytes to what is asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lora_fsdp.data.formats.nested import with_paths
from lora_fsdp.data.formats.records import checked_record
from lora_fsdp.errors import DataError, LoraFsdpError
from lora_fsdp.evaluation.answering.columns import Confidence
from lora_fsdp.evaluation.answering.rows import examples_of_records
from lora_fsdp.serving.limits import Limits, RequestError
from lora_fsdp.tasks import Example, Task

_PREDICT_FIELDS = ("rows", "texts", "min_probability", "coverage")


@dataclass(frozen=True)
class Asked:
    """Rows to answer, and how sure answers are to be."""

    examples: list[Example]
    confidence: Confidence


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body: UTF-8, every key once, finite numbers, whole characters.

    Raises:
        RequestError: 400, it is anything else.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"The body is not UTF-8 (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise RequestError(
            400, f"The body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except RecursionError as error:
        raise RequestError(400, "The body's JSON is nested too deeply.") from error
    except ValueError as error:  # a number of thousands of digits
        raise RequestError(400, f"The body's JSON cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise RequestError(400, f"The body must be a JSON object, not {_kind(value)}.")
    try:
        checked_record(value, "The body")
    except (DataError, RecursionError) as error:
        raise RequestError(400, str(error)) from error
    if _has_infinity(value):  # such as 1e999
        raise RequestError(400, "The body holds a number that is not finite.")
    return value


def parse_rows(body: Mapping[str, Any], task: Task, limits: Limits) -> Asked:
    """What `POST /predict` asks.

    Raises:
        RequestError: 400 or 413, and which field or row is wrong.
    """
    refuse_unknown(body, _PREDICT_FIELDS)
    if ("rows" in body) == ("texts" in body):
        raise RequestError(
            400, 'Give "rows" (a list of objects, by column) or "texts" (a list of texts).',
            param="rows",
        )  # fmt: skip
    name = "rows" if "rows" in body else "texts"
    given = body[name]
    if not isinstance(given, list) or not given:
        raise RequestError(400, f'"{name}" must be a list of one entry or more.', param=name)
    if len(given) > limits.max_rows:
        raise RequestError(
            413,
            f"{len(given)} rows, and at most {limits.max_rows} are taken at once (--max_rows).",
            param=name,
        )
    kind, words = (dict, "an object") if name == "rows" else (str, "a text")
    for number, one in enumerate(given, start=1):
        if not isinstance(one, kind):
            wrong = f"Row {number} must be {words}, not {_kind(one)}."
            raise RequestError(400, wrong, param=f"{name}[{number - 1}]")
    if name == "texts":
        given = [{text_column(task): text} for text in given]
    confidence = Confidence(
        least=_share(body, "min_probability"), coverage=_share(body, "coverage")
    )
    return Asked(examples_of(given, task, limits), confidence)


def examples_of(rows: Sequence[Mapping[str, Any]], task: Task, limits: Limits) -> list[Example]:
    """Rows as those of a JSON Lines file are read for `lora-fsdp predict`.

    Raises:
        RequestError: 400, a column or a choice is missing; 413, a text is too long.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    records = [with_paths({name: row.get(name) for name in columns}) for row in rows]
    try:
        examples = examples_of_records(
            task, records, columns=columns, first=1, source="The request"
        )
    except LoraFsdpError as error:
        raise RequestError(400, str(error), param="rows") from error
    for example in examples:
        prompt = example.prompt
        turns = (content for _, content in prompt.turns)
        texts = (prompt.lead, prompt.text, prompt.tail, *turns, *example.choices)
        if (length := sum(map(len, texts))) > limits.max_text_chars:
            raise RequestError(
                413,
                f"Row {example.row} has {length:,} characters, and at most "
                f"{limits.max_text_chars:,} are taken (--max_text_chars).",
                param="rows",
            )
    return examples


def text_column(task: Task) -> str:
    """The one column that the task asks about.

    Raises:
        RequestError: 400, it asks about more than one.
    """
    if not task.takes_one_text:
        raise RequestError(
            400,
            f'Task {task.name!r} asks about more than one text: give "rows" to POST /predict.',
        )
    return str(task.options().get("text_column") or "text")


def refuse_unknown(body: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a field that would be ignored.

    Raises:
        RequestError: 400, names it.
    """
    if unknown := [name for name in body if name not in known]:
        raise RequestError(
            400, f"There is no field {unknown[0][:80]!r}; known are {', '.join(known)}.",
            param=unknown[0][:80],
        )  # fmt: skip


def _share(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise RequestError(400, f'"{name}" must be a number between 0 and 1.', param=name)
    return float(value)


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(400, f"The body holds {name}, which is no JSON.")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RequestError(400, f"The key {twice[:80]!r} is there twice in one object.")
    return found


def _has_infinity(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_infinity, value.values()))
    if isinstance(value, list):
        return any(map(_has_infinity, value))
    return isinstance(value, float) and not math.isfinite(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")
