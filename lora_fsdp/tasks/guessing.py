"""Which columns hold text and label, and which task fits, where a table makes it plain.

By the columns' names first, then by their cells. Where two columns fit nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from lora_fsdp.tasks.cells import cell_text, label_fault, label_text

_TEXTS = frozenset({
    "abstract", "article", "body", "comment", "complaint", "content", "description", "document",
    "email", "feedback", "headline", "input", "message", "note", "post", "query", "question",
    "review", "sentence", "statement", "text", "ticket", "tweet", "utterance", "verbatim",
})  # fmt: skip
_LABELS = frozenset({
    "category", "class", "classification", "department", "emotion", "intent", "label", "mood",
    "polarity", "queue", "rating", "sentiment", "stars", "tag", "target", "team", "topic",
})  # fmt: skip
# Columns that divide or number the rows, and say nothing of them.
_NEITHER = frozenset({
    "date", "fold", "id", "idx", "index", "partition", "set", "split", "subset", "time",
    "timestamp", "uuid",
})  # fmt: skip
_ROWS_LOOKED_AT = 2000
_FEWEST_WORDS = 4
_MOST_LABELS_BY_NAME, _MOST_LABELS_BY_CELLS = 200, 30


@dataclass(frozen=True)
class Guess:
    """A column and why, or why there is none.

    Attributes:
        column: its name, or `None`.
        reason: for a sentence: "by its name", or which columns fit.
    """

    column: str | None
    reason: str


def guess_text_column(table: pd.DataFrame, *, besides: Sequence[str | None] = ()) -> Guess:
    """The column with the text, if one alone fits."""
    return _guess(table, besides, names=_TEXTS, fits=_is_text, by_cells=_is_prose,
                  what="the only one with sentences")  # fmt: skip


def guess_label_column(table: pd.DataFrame, *, besides: Sequence[str | None] = ()) -> Guess:
    """The column with the label, if one alone fits."""
    return _guess(table, besides, names=_LABELS, fits=_is_label, by_cells=_is_few,
                  what="the only one with a few values")  # fmt: skip


def guess_task(table: pd.DataFrame) -> str | None:
    """The built-in task that a table's columns are made for, or `None`.

    Conversations, instructions and questions with a text by their columns' names; then a
    classification, if text and label can be guessed.
    """
    columns = {str(column) for column in table.columns}
    for task, needed in (
        ("chat", {"messages"}),
        ("chat", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("question_answering", {"context", "question", "answers"}),
        ("question_answering", {"context", "question", "answer"}),
        ("inference", {"premise", "hypothesis", "label"}),
        ("summarisation", {"text", "summary"}),
    ):
        if needed <= columns:
            return task
    text = guess_text_column(table).column
    label = guess_label_column(table, besides=[text]).column
    return "classification" if text is not None and label is not None else None


def _guess(
    table: pd.DataFrame,
    besides: Sequence[str | None],
    *,
    names: frozenset[str],
    fits: Callable[[pd.Series], bool],
    by_cells: Callable[[pd.Series], bool],
    what: str,
) -> Guess:
    head = table.head(_ROWS_LOOKED_AT)
    columns = [str(c) for c in table.columns if c not in besides and not _words(str(c)) & _NEITHER]
    # "label" itself before "category": the plainest name of all, if there is but one such column.
    plainest = names & {"text", "label"}
    exact = [name for name in columns if name.lower() in plainest]
    named = [name for name in columns if _words(name) & names and fits(head[name])]
    if len(exact) == 1 and exact[0] in named:
        named = exact
    if len(named) == 1:
        return Guess(named[0], "by its name")
    if not named:
        named = [name for name in columns if by_cells(head[name])]
        if len(named) == 1:
            return Guess(named[0], what)
    return Guess(None, f"it may be {' or '.join(map(repr, named[:4]))}" if named else "none fits")


def _words(name: str) -> set[str]:
    """The words of a column's name, in the singular: `reviewText`, `customer_messages`."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", apart)]
    return {*words, *(word.removesuffix("s") for word in words if word not in _LABELS)}


def _texts(column: pd.Series) -> list[str]:
    return [text for text in map(cell_text, column) if text.strip()]


def _is_text(column: pd.Series) -> bool:
    """Texts and no numbers: most cells have letters."""
    texts = _texts(column)
    return bool(texts) and sum(any(map(str.isalpha, one)) for one in texts) > len(texts) / 2


def _is_prose(column: pd.Series) -> bool:
    """Sentences that hardly repeat."""
    texts = _texts(column)
    if not texts or not _is_text(column):
        return False
    words = sum(len(text.split()) for text in texts) / len(texts)
    return words >= _FEWEST_WORDS and len(set(texts)) > len(texts) / 2


def _labels(column: pd.Series) -> set[str]:
    """The values of a column whose cells can be labels; none of another one."""
    if any(label_fault(cell) for cell in column):
        return set()
    return {label_text(cell) for cell in column} - {""}


def _is_label(column: pd.Series) -> bool:
    return 2 <= len(_labels(column)) <= min(_MOST_LABELS_BY_NAME, max(2, len(column) * 0.75))


def _is_few(column: pd.Series) -> bool:
    """A few values, each of them several times, and no decimals."""
    found = _labels(column)
    if not 2 <= len(found) <= min(_MOST_LABELS_BY_CELLS, len(column) / 3):
        return False
    return not any(re.fullmatch(r"-?\d+[.,]\d+", value) for value in found)
