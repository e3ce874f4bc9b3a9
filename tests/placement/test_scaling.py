"""The simulation of many machines: beside what was measured, and as the documentation says.

Run: python -m pytest tests/placement/test_scaling.py
"""

from __future__ import annotations

import json

import pytest

from benchmarks.scaling import (
    COUNTS,
    FILE,
    LINKS,
    PLOT,
    efficiency,
    everything,
    measured_points,
    simulate,
    table,
)
from tests.test_documentation import ROOT

DATA = ROOT / ".cache" / "default" / "airline_tweets.csv"
PAGE = ROOT / "docs" / "many-machines.md"


@pytest.fixture(scope="module")
def found():
    return list(everything())


@pytest.mark.skipif(
    not DATA.exists(), reason="needs the prepared default: lora-fsdp demo --prepare_only"
)
def test_every_measured_point_is_within_fifteen_percent(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the benchmarks find their data
    points = measured_points()
    errors = {one["name"]: one["simulated_ms"] / one["measured_ms"] - 1 for one in points}
    assert {one["gpus"] for one in points} == {1, 2}
    assert len(points) > 60
    assert max(map(abs, errors.values())) < 0.15, errors


@pytest.mark.slow
def test_the_stored_numbers_are_those_of_today(found):
    # Otherwise: python -m benchmarks.scaling --plot
    stored = json.loads(FILE.read_text(encoding="utf-8"))["simulated"]
    assert [one["seconds"] for one in stored] == pytest.approx([one.seconds for one in found])
    assert len(stored) == len(found) == 4 * 3 * len(LINKS) * len(COUNTS)


@pytest.mark.slow
def test_the_documentation_has_the_table_and_the_plot(found):
    page = PAGE.read_text(encoding="utf-8")
    assert table(found) in page
    assert f"images/{PLOT.name}" in page
    assert PLOT.read_text(encoding="utf-8").count("<path") > 20


@pytest.mark.slow
def test_seventy_billion_on_two_hosts_keeps_ninety_five_percent():
    """Where only the adapter's gradients cross, over the slowest network that is looked at."""
    one, two = (simulate("70B", "hybrid", gpus=gpus, link=10) for gpus in (8, 16))
    assert one.seconds / two.seconds > 0.95


@pytest.mark.slow
def test_more_hosts_and_slower_links_are_never_faster(found):
    for one in found:
        if one.gpus > 8:
            fewer = simulate(one.model, one.layout, gpus=one.gpus // 2, link=one.link)
            assert one.seconds >= 0.999 * fewer.seconds
        if one.link > LINKS[0]:
            slower = simulate(one.model, one.layout, gpus=one.gpus, link=LINKS[0])
            assert one.seconds <= slower.seconds
    assert efficiency(simulate("70B", "resident", gpus=8, link=10)) is None  # it does not fit
