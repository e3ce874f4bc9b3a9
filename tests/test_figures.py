"""Every figure with a unit in README and docs is stored, held by a test, or marked as measured.

A figure passes if it is a rounded value of `benchmarks/results/`, of that unit; if a test file that
its section names in backticks contains the number; if it stands under a comment that names a test
which reads the section and computes it anew, `<!-- held: tests/... -->`; or if it is a setting, a
limit or a definition that `SETTINGS` lists. Under `<!-- measured: FILE, FILE -->` (until the next
heading or comment) it must be in those of the stored results, and so must every number of a table's
cells. `<!-- measured: command; device; date -->` stands over a transcript, which is compared with
what the command prints. Quotients in tables are computed again from the numbers beside them.

Run: python -m pytest tests/test_figures.py
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.throughput import RESULTS, table
from tests.test_documentation import ROOT, each_page, name_of

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
# Generated from the options, and held to them.
GENERATED = {"docs/commands.md", "docs/reference.md"}

FIGURE = re.compile(
    r"(?<![\w.,/-])(?P<number>\d[\d,]*(?:\.\d+)?)\s?"
    r"(?P<unit>examples/s|tokens/s|rows/s|TFLOP/s|GiB|GB|MB|kB|TB|ms|µs|s|min|minutes?|seconds?"
    r"|hours?|x|\u00d7|%|times|个样本|macro-F1)(?![A-Za-z/_])"
)
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w|\.\d)")
MARK = re.compile(r"<!-- measured: (?P<how>[^>]*?) -->")
# A test that reads the section from the page and computes its figures anew.
HELD = re.compile(r"<!-- held: (?P<test>tests/[\w/]+\.py)(?:; (?P<file>[\w.-]+))? -->")
# Of a command that is run for its transcript (tests/support/transcripts.py): on what, when.
TRANSCRIPT = re.compile(r"(?P<command>[^;]+); [^;]+; \d{4}-\d\d-\d\d")
# Measured by hand, without a file: the command, and why no stored result holds it.
BY_HAND: dict[str, str] = {}
# What runs them and compares.
COMPARED_BY = {
    "make sentiment": ".ci/run",
    "lora-fsdp train --seeds 3 --max_rows 100": "tests/sweeps/test_transcript.py",
}

# What no one measures: page and words around the figure, as they stand there.
SETTINGS: dict[str, tuple[str, ...]] = {
    "docs/doctor.md": ("more than 20 times the rows",),
    "docs/hostile-input.md": ("1,000,000 steps, 5 seconds, 200,000 values", "may take 30 seconds"),
    "docs/many-machines.md": (
        "files above 64 MB",
        "(a test allows 15 %)",
        "| 600 GB |",
        "after 30 s without an answer",
    ),
    "docs/memory.md": ("(at most 256 MB and a tensor)",),
    "docs/planning.md": ("`--gpus 4xMyCard:48GB:200TFLOPS:900GB/s:20GB/s`",),
    "docs/reliability.md": (
        "`--stall_seconds` (10 minutes",
        "after 30 seconds where it does not answer",
    ),
    "docs/report.md": (
        "the 95 % Wilson score interval",
        "with 95 % confidence",
        "in at least 90 % of rows",
        "drawn 500 times",
    ),
    "docs/sweeps.md": ("with 95 % confidence",),
}

# Of the results' keys, which hold a unit's values, and what one of them is in that unit.
KEYS = {
    "examples/s": (r"(examples|scored)_per_second(_mean)?", 1),
    "个样本": (r"(examples|scored)_per_second(_mean)?", 1),
    "tokens/s": (r"tokens_per_second", 1),
    "GB": (r"\w+_gb", 1),
    "ms": (r"\w+_ms", 1),
    "s": (r"\w+_s", 1),
    "MB": (r"sent_bytes", 1e-6),
    "times": (r"ratio", 1),
    "%": (r"efficiency|error_\w+", 100),
}


def values_of(result: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Key and value of every number in a result."""
    if isinstance(result, dict):
        for name, value in result.items():
            yield from values_of(value, name)
    elif isinstance(result, list):
        for value in result:
            yield from values_of(value, key)
    elif isinstance(result, int | float) and not isinstance(result, bool):
        yield key, abs(result)


def values_in(path: Path) -> Iterator[tuple[str, float]]:
    """Key and value of every number in a stored file; those that were printed have no key."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        result = json.loads(text)
        yield from values_of(result)
        printed = table(result) if "arms" in result else ""
    else:  # what a command printed, whose file was lost: a line of JSON an arm, and tables
        for found in re.findall(r"^[\w-]+: (\{.*\})$", text, re.MULTILINE):
            yield from values_of(json.loads(found))
        printed = text
    for number in NUMBER.findall(printed):
        yield "", float(number.replace(",", ""))


STORED = {path.name: list(values_in(path)) for path in sorted(RESULTS.iterdir()) if path.is_file()}


def rounds_to(value: float, number: str) -> bool:
    """Whether `number` is `value` with as many decimals, or to three digits."""
    digits = number.replace(",", "")
    decimals = len(digits.partition(".")[2])
    shown = float(digits)
    return round(value, decimals) == shown or (
        shown >= 1000 and float(f"{value:.3g}") == shown and shown % 10 == 0
    )


def is_stored(number: str, unit: str) -> bool:
    pattern, factor = KEYS.get(unit, ("(?!)", 1))
    return any(
        rounds_to(value * factor, number)
        for values in STORED.values()
        for key, value in values
        if re.fullmatch(pattern, key)
    ) or (unit in ("x", "\u00d7") and is_quotient(number, STORED))


def is_quotient(number: str, files: Iterable[str]) -> bool:
    """Of two arms' speeds in one result."""
    speeds = [[v for key, v in STORED[f] if key == "examples_per_second"] for f in files]
    return any(b and rounds_to(a / b, number) for found in speeds for a in found for b in found)


def is_in(files: Sequence[str], number: str, unit: str = "") -> bool:
    """Whether one of these files has it, in this unit or a thousand times as large or small."""
    values = [value for file in files for _, value in STORED[file]]
    factors = [100.0, 1.0] if unit == "%" else [1.0, 1e-3, 1e3, 1e-6]
    found = any(rounds_to(value * factor, number) for value in values for factor in factors)
    return found or is_quotient(number, files)


def sections(text: str) -> Iterator[tuple[int, str]]:
    """Offset and text of what stands under each heading, outside shell and Python blocks."""
    text = re.sub(
        r"^ *```(?:bash|python|yaml|toml|sh|json)\n.*?^ *```$",
        lambda block: re.sub(r"[^\n]", " ", block[0]),
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    starts = [0, *(match.start() for match in re.finditer(r"^#+ ", text, re.MULTILINE)), len(text)]
    for start, end in itertools.pairwise(starts):
        yield start, text[start:end]


def mark_before(section: str, place: int) -> str:
    """The last comment before `place`."""
    comments = re.findall(r"<!--.*?-->", section[:place], re.DOTALL)
    return comments[-1] if comments else ""


def files_of(mark: str) -> list[str]:
    """The stored results that a mark names."""
    match = MARK.fullmatch(mark)
    names = match["how"].split(", ") if match else []
    return [name for name in names if name in STORED]


def is_marked(section: str, match: re.Match[str]) -> bool:
    """Whether the comment before a figure names what holds it, and that does."""
    mark = mark_before(section, match.start())
    if files := files_of(mark):
        return is_in(files, match["number"], match["unit"])
    return bool(MARK.fullmatch(mark) or HELD.fullmatch(mark))


def cells_unbacked(section: str) -> Iterator[str]:
    """Numbers in tables under a mark that are in none of the files that it names."""
    rows = r"^\|[^|\n]*\|(?P<cells>.*)\|$(?!\n\| -)"  # the first one is the table's head
    for row in re.finditer(rows, section, re.MULTILINE):
        files = files_of(mark_before(section, row.start()))
        for number in NUMBER.finditer(row["cells"]) if files else ():
            unit = "%" if row["cells"][number.end() :].lstrip().startswith("%") else ""
            if not is_in(files, number[0], unit):
                yield f"{number[0]!r} in {row[0]!r}"


def is_in_a_named_test(section: str, number: str, unit: str) -> bool:
    spellings = {number, number.replace(",", ""), number.replace(",", "_")}
    if unit == "%":
        spellings.add(f"{float(number.replace(',', '')) / 100:g}")
    pattern = rf"(?<![\w.])(?:{'|'.join(map(re.escape, spellings))})(?![\w.]|\.\d)"
    named = {ROOT / name for name in re.findall(r"`(tests/[\w/]+\.py)`", section)}
    return any(re.search(pattern, path.read_text(encoding="utf-8")) for path in named)


def is_a_setting(page: str, section: str, start: int, end: int) -> bool:
    flat = re.sub(r"\s", " ", section)
    for words in SETTINGS.get(page, ()):
        at = flat.find(words)
        while at != -1:
            if at <= start and end <= at + len(words):
                return True
            at = flat.find(words, at + 1)
    return False


def unbacked(page: str, text: str) -> list[str]:
    """The page's figures that nothing backs."""
    found = []
    for offset, section in sections(text):
        for match in FIGURE.finditer(section):
            number, unit = match["number"], match["unit"]
            if not (
                is_marked(section, match)
                or is_a_setting(page, section, match.start(), match.end())
                or is_stored(number, unit)
                or is_in_a_named_test(section, number, unit)
            ):
                line = text.count("\n", 0, offset + match.start()) + 1
                around = section[max(0, match.start() - 40) : match.end() + 40]
                found.append(f"{page}:{line}: {match[0]!r} in {' '.join(around.split())!r}")
        line = text.count("\n", 0, offset) + 1
        found += [f"{page}, section of line {line}: {one}" for one in cells_unbacked(section)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_are_backed(page: Path) -> None:
    if name_of(page) in GENERATED:
        pytest.skip("made from the options; test_documentation.py compares")
    found = unbacked(name_of(page), page.read_text(encoding="utf-8"))
    assert not found, "store it, test it, mark it or say it without a number:\n" + "\n".join(found)


@each_page
def test_marks_say_how_on_what_and_when(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for mark in HELD.finditer(text):
        assert "PAGE.read_text" in (ROOT / mark["test"]).read_text(encoding="utf-8")
        assert mark["file"] is None or mark["file"] in STORED
    for mark in MARK.finditer(text):
        names = mark["how"].split(", ")
        if transcript := TRANSCRIPT.fullmatch(mark["how"]):
            command = transcript["command"]
            if command in BY_HAND:
                continue
            assert command in (ROOT / COMPARED_BY[command]).read_text(encoding="utf-8")
        else:
            assert files_of(mark[0]) == names, mark[0]


def test_a_new_figure_is_found() -> None:
    page = "# A\n\nIt trains 987.6 examples/s, 77 x as fast.\n"
    assert len(unbacked("docs/new.md", page)) == 2
    assert len(unbacked("docs/new.md", f"<!-- measured: h200-x2.json -->\n{page}")) == 2
    cells = "# A\n\n<!-- measured: h200-x2.json -->\n\n| GPUs | a |\n| --- | --- |\n| 2 | {} |\n"
    assert unbacked("docs/new.md", cells.format("88.0")) == []
    assert len(unbacked("docs/new.md", cells.format("88.1"))) == 1
    mark = "<!-- measured: make sentiment; a GPU; 2026-11-29 -->\n"
    assert unbacked("docs/new.md", page.replace("It", f"{mark}\nIt")) == []
    assert len(unbacked("docs/new.md", f"{mark}\n{page}")) == 2  # another section's
    assert unbacked("docs/new.md", "It trains 422 examples/s, 9.5 x TRL's 44.2 examples/s.") == []


def test_settings_are_in_their_pages() -> None:
    """What left a page leaves the list."""
    for page, words in SETTINGS.items():
        flat = re.sub(r"\s", " ", (ROOT / page).read_text(encoding="utf-8"))
        assert [one for one in words if one not in flat] == []


def first_number(cell: str) -> float | None:
    match = re.match(r"[\d,]*\d(?:\.\d+)?", cell.strip())
    return float(match[0].replace(",", "")) if match else None


def quotients(text: str) -> Iterator[tuple[str, float, float, float]]:
    """Row, quotient and its two numbers: two cells beside it, or its row's and the row's of 1."""
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[c.strip() for c in line.strip("| \n").split(" | ")] for line in lines.splitlines()]
        for row in rows[2:]:
            for column, cell in enumerate(row):
                match = re.fullmatch(r"(\d+(?:\.\d+)?) x", cell)
                if match is None:
                    continue
                first, second = (first_number(c) for c in row[column - 2 : column])
                if second is not None and first is None:  # against another row
                    [reference] = [r for r in rows[2:] if r[column : column + 1] == ["1"]]
                    first, second = second, first_number(reference[column - 1])
                assert first, row
                assert second, row
                yield row[0], float(match[1]), first, second


def test_quotients_are_those_of_the_numbers_beside_them() -> None:
    found = [one for page in PAGES for one in quotients(page.read_text(encoding="utf-8"))]
    assert len(found) >= 13
    wrong = [one for one in found if abs(one[2] / one[3] - one[1]) > 0.06]
    assert not wrong
