"""How transcripts are held to what is printed; `.ci/run` holds `make sentiment`'s to the real run.

Run: python -m pytest tests/test_transcripts.py
"""

from __future__ import annotations

import re

import pytest

from tests.support.transcripts import PAGES, check, is_same_line, not_printed, transcripts_of

STEP = "step 10/100  loss 3.427  learning_rate 0.001916  examples/s 5.115  ETA 0:02:21"


def test_every_page_of_the_main_job_is_compared() -> None:
    pages = {
        page.name: list(transcripts_of(page.read_text(encoding="utf-8"), "make sentiment"))
        for page in PAGES
    }
    compared = {name: found for name, found in pages.items() if found}
    assert set(compared) >= {"README.md", "README.zh-CN.md", "quickstart.md", "fsdp.md"}
    for page in PAGES:
        marks = re.findall("<!-- measured: make sentiment;", page.read_text(encoding="utf-8"))
        assert len(marks) == len(pages[page.name])


@pytest.mark.parametrize(
    ("printed", "is_same"),
    [
        (STEP, True),
        (STEP.replace("5.115", "61.3").replace("0:02:21", "0:00:12"), True),
        (STEP.replace("3.427", "3.431"), True),
        (STEP.replace("3.427", "2.9"), False),
        (STEP.replace("10/100", "10/101"), False),
        (STEP.replace("loss", "nll"), False),
        ("", False),
    ],
)
def test_words_and_whole_numbers_are_exact(printed: str, is_same: bool) -> None:
    assert is_same_line(STEP, printed) is is_same


def test_wider_columns_are_the_same_table() -> None:
    assert is_same_line(" ────\n  a   0.5   yes", " ──────\n  a     0.5     yes")
    assert not is_same_line("  a   0.5   yes", "  a   0.5   no")


def test_lines_are_looked_for_in_order() -> None:
    assert not_printed(["a", "…", "c"], ["a", "b", "c", "d"]) == []
    assert not_printed(["c", "a"], ["a", "b", "c"]) == ["a"]


def test_a_transcript_of_another_day_is_found() -> None:
    assert any(
        "quickstart.md" in line for line in check("make sentiment", "Task sentiment: 7 rows")
    )
