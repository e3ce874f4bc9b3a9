"""The pages' transcripts of a command beside what it prints.

A transcript is the text block behind a comment `<!-- measured: command; device; date -->`. Words
and whole numbers must be printed as they stand, in their order. Other numbers may differ as sums do
in another order on another processor; speeds and times are a machine's and are not compared. A line
`…` stands for any lines.

Run: make sentiment > output.txt && python -m tests.support.transcripts "make sentiment" output.txt
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]

# What the machine decides.
TIMED = re.compile(r"(?:examples/s|tokens/s|ETA) +[\d.,:]+")
NUMBER = re.compile(r"(?<![\w.])[+\N{MINUS SIGN}-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)")
ABSOLUTE, RELATIVE = 0.02, 0.05


def transcripts_of(page: str, command: str) -> Iterator[list[str]]:
    """The lines of each of the page's transcripts of `command`: the first block behind a mark."""
    for text in page.split(f"<!-- measured: {command}; ")[1:]:
        block = re.match(r"(?:(?!```|<!--)[^\n]*\n)*```text\n(?P<lines>(?:(?!```)[^\n]*\n)*)", text)
        if block:
            yield [line for line in block["lines"].splitlines() if not line.startswith("$ ")]


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("\N{MINUS SIGN}", "-"))


def is_same_line(shown: str, printed: str) -> bool:
    """Whether a page's line is the program's, but for rounding and for times."""
    shown, printed = (TIMED.sub("", line).strip() for line in (shown, printed))
    if [*NUMBER.split(shown)] != [*NUMBER.split(printed)]:
        # A column is as wide as its widest cell: spaces and rules say nothing.
        flat = [re.sub(r"[ ─]+", " ", NUMBER.sub("0", line)) for line in (shown, printed)]
        if flat[0] != flat[1]:
            return False
    for left, right in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
        wanted, got = _value(left), _value(right)
        is_exact = not re.search(r"[.e]", left + right)
        room = 0.0 if is_exact else max(ABSOLUTE, RELATIVE * abs(wanted))
        if abs(wanted - got) > room:
            return False
    return True


def not_printed(shown: list[str], printed: list[str]) -> list[str]:
    """The transcript's lines that the output has not, each looked for behind the one before."""
    missing, at = [], 0
    for line in shown:
        if not line.strip() or line.strip() == "…":
            continue
        found = next((i for i in range(at, len(printed)) if is_same_line(line, printed[i])), None)
        if found is None:
            missing.append(line)
        else:
            at = found + 1
    return missing


def check(command: str, output: str) -> list[str]:
    """What the pages say that `command` prints, and it did not: page and line."""
    printed = output.splitlines()
    return [
        f"{page.relative_to(ROOT)}: {line.strip()}"
        for page in PAGES
        for shown in transcripts_of(page.read_text(encoding="utf-8"), command)
        for line in not_printed(shown, printed)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", help="as the pages have it: make sentiment")
    parser.add_argument("output", type=Path, help="the file with what it printed")
    options = parser.parse_args()
    missing = check(options.command, options.output.read_text(encoding="utf-8"))
    if missing:
        sys.exit("not printed today:\n" + "\n".join(missing))


if __name__ == "__main__":
    main()
