"""What labelling tools export, as rows of texts and labels; what nobody answered is left out.

Known by what only they write: Label Studio (JSON), Argilla (JSON, and the columns of its datasets),
Doccano (JSON Lines) and Prodigy (JSON Lines). Everything else stays as it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fsdp.errors import NoRowsError, UnsupportedTableError

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
#: The row's own columns, and the answers to its questions.
_Answered = tuple[Row, Row]
_TOKEN_FORMATS = (".conll", ".conllu", ".conllx", ".iob", ".iob2", ".bio", ".bioes")
_SPANS = "holds marked spans of texts, which are no answer for a whole text"


class _LeftOut(Exception):
    """A row without an answer, and why."""


def refuse_token_labels(source: Path, suffix: str) -> None:
    """Say that a label for each word is not what is learnt here.

    Raises:
        UnsupportedTableError: the file is of a format for such labels.
    """
    if suffix in _TOKEN_FORMATS:
        raise UnsupportedTableError(
            f"{source} has a label for each word (CoNLL), and here a whole text has one answer: "
            "for the words of a text use the task extraction, with a table of texts and objects."
        )


def plain_rows(rows: Sequence[Row], source: Path) -> Sequence[Row]:
    """The rows of an export as those of a table; other rows as they are.

    Args:
        rows: of a JSON file, JSON Lines or a dataset.
        source: for messages.

    Raises:
        UnsupportedTableError: what was labelled is no answer for a whole text.
        NoRowsError: no row was answered.
    """
    for name, (is_one, convert) in _TOOLS.items():
        if rows and all(map(is_one, rows[:5])):
            return _converted(name, rows, convert, source)
    return rows


def _converted(
    name: str, rows: Sequence[Row], convert: Callable[[Row], _Answered], source: Path
) -> Sequence[Row]:
    kept: list[_Answered] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            fields, answers = convert(row)
            kept.append((fields, answers))
        except _LeftOut as reason:
            left_out[str(reason)] += 1
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise UnsupportedTableError(
                f"{source}, row {number}: not as {name} writes it ({type(error).__name__}: "
                f"{error}). Export it as CSV."
            ) from error
        except ValueError as error:
            raise UnsupportedTableError(f"{source}, row {number}: {error}.") from error
    counts = ", ".join(f"{count} {why}" for why, count in left_out.items())
    if not kept:
        raise NoRowsError(f"{source} is an export of {name} without an answered row ({counts}).")
    logger.info("%s is an export of %s: %d rows%s.", source, name, len(kept),
                f"; left out {counts}" if counts else "")  # fmt: skip
    several = {
        question
        for _, answers in kept
        for question, answer in answers.items()
        if isinstance(answer, list) and len(answer) > 1
    }
    return [
        {**fields, **{q: _answer(a, is_list=q in several) for q, a in answers.items()}}
        for fields, answers in kept
    ]


def _answer(answer: Any, *, is_list: bool) -> Any:
    """A question's answer: a list if some row's has several entries, else the only entry."""
    if is_list:
        return answer if isinstance(answer, list) else [answer]
    return (answer[0] if answer else None) if isinstance(answer, list) else answer


# ---- Prodigy: an answer is accepted, rejected or ignored ----------------------------------------


def _is_prodigy(row: Row) -> bool:
    return "_task_hash" in row and row.get("answer") in ("accept", "reject", "ignore")


def _prodigy(row: Row) -> _Answered:
    if row["answer"] != "accept":
        raise _LeftOut({"reject": "rejected", "ignore": "ignored"}[row["answer"]])
    if row.get("spans") and "label" not in row and not row.get("accept"):
        raise ValueError(_SPANS)
    kept = {k: v for k, v in row.items() if not k.startswith("_") and k not in (
        "answer", "accept", "label", "options", "spans", "tokens", "config", "style")}  # fmt: skip
    label = row.get("accept", row.get("label"))
    return kept, {} if label is None else {"label": label}


# ---- Label Studio: tasks with annotations, each a list of results -------------------------------


def _is_label_studio(row: Row) -> bool:
    return isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list)


def _label_studio(row: Row) -> _Answered:
    given = [one for one in row["annotations"] if not one.get("was_cancelled")]
    if not given:
        raise _LeftOut("not annotated" if not row["annotations"] else "skipped")
    answers = [_label_studio_answers(one["result"]) for one in given if one["result"]]
    if not answers:
        raise _LeftOut("annotated with nothing")
    if any(other != answers[0] for other in answers[1:]):
        raise _LeftOut("annotated in several ways")
    return row["data"], answers[0]


def _label_studio_answers(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for result in results:
        kind, value = result["type"], result.get("value", {})
        if kind not in ("choices", "taxonomy", "textarea", "rating", "number"):
            raise ValueError(_SPANS if kind.endswith("labels") else f"has answers of type {kind!r}")
        key = "text" if kind == "textarea" else kind
        found[result["from_name"]] = value[key]
    return found


# ---- Doccano: a list of labels beside each text -------------------------------------------------


def _is_doccano(row: Row) -> bool:
    return set(row) <= {"id", "text", "data", "label", "labels", "Comments", "comments", "cats",
                        "meta", "entities", "relations"} and "id" in row and (
        isinstance(row.get("label"), list) or isinstance(row.get("cats"), list)
        or isinstance(row.get("entities"), list))  # fmt: skip


def _doccano(row: Row) -> _Answered:
    labels = row.get("label", row.get("cats"))
    if labels is None or any(isinstance(label, list) for label in labels):
        raise ValueError(_SPANS)
    kept = {key: value for key, value in row.items() if key not in ("label", "cats")}
    if "data" in kept and "text" not in kept:
        kept["text"] = kept.pop("data")
    return kept, {"label": labels}


# ---- Argilla: fields, and the responses of several people ---------------------------------------


def _is_argilla(row: Row) -> bool:
    nested = isinstance(row.get("fields"), dict) and isinstance(row.get("responses"), dict)
    flat = any(str(key).endswith(".responses.status") for key in row)
    return nested or flat or {"annotation", "annotation_agent", "prediction", "status"} <= set(row)


def _argilla(row: Row) -> _Answered:
    if "annotation_agent" in row:
        return _old_argilla(row)
    if isinstance(row.get("fields"), dict):
        questions = {
            name: [one["value"] for one in given if one.get("status") in (None, "submitted")]
            for name, given in row["responses"].items()
        }
        return {**row["fields"], **(row.get("metadata") or {})}, _agreed(questions)
    ends = (".responses", ".responses.users", ".responses.status", ".suggestion",
            ".suggestion.agent", ".suggestion.score")  # fmt: skip
    questions = {}
    for key in row:
        if str(key).endswith(".responses"):
            status = row.get(f"{key}.status") or []
            given = zip(row[key] or [], status, strict=False)
            questions[str(key).removesuffix(".responses")] = [
                v for v, s in given if s == "submitted"
            ]
    kept = {key: value for key, value in row.items() if not str(key).endswith(ends)}
    own = {key: value for key, value in kept.items() if key not in ("id", "status", "_server_id")}
    return own, _agreed(questions)


def _old_argilla(row: Row) -> _Answered:
    if row["status"] == "Discarded":
        raise _LeftOut("discarded")
    if row["annotation"] in (None, []):
        raise _LeftOut("not annotated")
    inputs = row.get("inputs")
    texts = dict(inputs) if isinstance(inputs, dict) else {"text": row.get("text")}
    return texts, {"label": row["annotation"]}


def _agreed(questions: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    answered = {name: given for name, given in questions.items() if given}
    if not answered:
        raise _LeftOut("not answered")
    if any(other != given[0] for given in answered.values() for other in given[1:]):
        raise _LeftOut("answered in several ways")
    return {name: given[0] for name, given in answered.items()}


_TOOLS: dict[str, tuple[Callable[[Row], bool], Callable[[Row], _Answered]]] = {
    "Prodigy": (_is_prodigy, _prodigy),
    "Label Studio": (_is_label_studio, _label_studio),
    "Argilla": (_is_argilla, _argilla),
    "Doccano": (_is_doccano, _doccano),
}
