"""What the plan says today, beside what was measured on a GPU.

Run: python -m pytest tests/planning/test_measured.py
"""

import json

import pytest

from benchmarks.planning import GRID, predicted
from benchmarks.throughput import RESULTS
from tests.test_documentation import ROOT

DATA = ROOT / ".cache" / "default" / "airline_tweets.csv"
MEASURED = json.loads((RESULTS / "planning-h100.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.skipif(
    not DATA.exists(), reason="needs the prepared default: python examples/prepare_default.py"
)


@pytest.mark.parametrize(
    "name",
    [
        "deepseek-7b-qv",
        "deepseek-7b-qv-long-4bit",
        "deepseek-7b-all-r64-long-again",
        "llama-1b-all-r64",
        "llama-1b-all-r64-long-4bit",
    ],
)
def test_the_plan_is_as_good_as_the_documentation_says(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the benchmarks find their data
    point = MEASURED["points"][name]
    now = predicted(GRID[name], device=MEASURED["environment"]["device"], measured=point)
    assert abs(now["error_gb"]) < 0.05
    assert abs(now.get("error_ms", 0.0)) < 0.1
    # Otherwise: python -m benchmarks.planning --foretell, and docs/planning.md.
    assert now == point


def test_the_documentation_has_every_point():
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for point in MEASURED["points"].values():
        cells = f"| {point['predicted_gb']:.2f} | {point['measured_gb']:.2f} |"
        assert cells in page
