"""The one way of texts to a terminal or a page: nothing invisible in them does anything there.

A label, a file's name or a model's answer may hold an escape sequence, or a character that turns
the direction of what follows it. Neither reaches a reader: each is shown as its escape.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
import warnings
from typing import Any, TextIO

# Parts of ordinary writing that `str.isprintable` counts as invisible: joiners in emoji and in
# Persian or Indic words, and the marks of writing direction that do not reorder other text.
_HARMLESS = {"\u200c", "\u200d", "\u200e", "\u200f"}
_LINES = {"\n", "\t"}
# Names of settings whose value is nobody else's business.
_SECRET_NAME = re.compile(r"(?i)(token|key|secret|password|passwd|pwd|passphrase|credentials?)$")
# The user and password of an address, a secret among its parameters, tokens by their look.
_SECRET_TEXTS = (
    (re.compile(r"(?<=://)[^/?#\s@]*(?:@[^/?#\s@]*)*@"), "***@"),
    (re.compile(r"(?i)([?&][\w-]*(?:token|key|secret|password|sig)=)[^&#\s\"']+"), r"\1***"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[\w-]{16,}"), "***"),
)


def visible(text: str, *, lines: bool = True) -> str:
    """`text` with control characters and those that turn the direction of text as escapes.

    Args:
        text: any text.
        lines: leave line breaks and tabs as they are; otherwise they are escapes too.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if _may_be_shown(letter, lines=lines) else letter.encode("unicode_escape").decode()
        for letter in text
    )


def visible_json(document: str) -> str:
    """A JSON document that says the same and can be shown."""
    if document.isprintable():
        return document
    return "".join(
        letter if _may_be_shown(letter, lines=True) else json.dumps(letter)[1:-1]
        for letter in document
    )


def without_secrets(value: Any) -> Any:
    """`value` with "***" for secrets in it, however deep: by a setting's name, or by their look.

    A text that is JSON, such as the value of `--task_options`, is looked into.
    """
    if isinstance(value, dict):
        return {name: _hidden(name, entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("{", "[")):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if parsed is not None and (hidden := without_secrets(parsed)) != parsed:
            return json.dumps(hidden, ensure_ascii=False)
    for pattern, shown in _SECRET_TEXTS:
        value = pattern.sub(shown, value)
    return value


def _hidden(name: object, value: Any) -> Any:
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    if is_secret_name(str(name)) and is_plain and value != "":
        return "***"
    return without_secrets(value)


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def say(text: str, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a line or several, on stdout unless `file` is another stream."""
    stream = sys.stdout if file is None else file
    print(visible(text), file=stream, flush=flush)


def cost_text(cost: float) -> str:
    """A sum of money: two decimals, and what is less than a cent with two digits that count."""
    return f"{cost:.2g}" if 0 < cost < 0.01 else f"{cost:.2f}"


def ignore_known_warnings() -> None:
    """Keep off the terminal what other libraries warn of and no user can change."""
    # peft 0.21 asks transformers >= 5.20 by the switch's old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def _may_be_shown(letter: str, *, lines: bool) -> bool:
    if letter.isprintable() or letter in _HARMLESS or (lines and letter in _LINES):
        return True
    # Blanks of other widths, such as the one between Chinese characters.
    return unicodedata.category(letter) == "Zs"
