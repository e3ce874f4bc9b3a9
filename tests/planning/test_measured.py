"""What the plan says today, beside what was measured on a GPU.

Run: python -m pytest tests/planning/test_measured.py
"""

import json

import pytest

from benchmarks.planning import GRID, PAGE, predicted, tables
from benchmarks.throughput import RESULTS
from tests.test_documentation import ROOT

DATA = ROOT / ".cache" / "default" / "airline_tweets.csv"
MEASURED = {
    file.stem.removeprefix("planning-"): json.loads(file.read_text(encoding="utf-8"))
    for file in sorted(RESULTS.glob("planning-*.json"))
}

pytestmark = pytest.mark.skipif(
    not DATA.exists(), reason="needs the prepared default: python examples/prepare_default.py"
)


@pytest.mark.parametrize("gpu", MEASURED)
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
def test_the_plan_is_as_good_as_the_documentation_says(gpu, name, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the benchmarks find their data
    point = MEASURED[gpu]["points"][name]
    now = predicted(GRID[name], device=MEASURED[gpu]["environment"]["device"], measured=point)
    assert abs(now["error_gb"]) < 0.08
    assert abs(now.get("error_ms", 0.0)) < 0.2
    # Otherwise: python -m benchmarks.planning --foretell, which also writes the page's tables.
    assert now == point


@pytest.mark.parametrize("gpu", MEASURED)
def test_the_documentation_has_every_point(gpu):
    assert tables(MEASURED[gpu]["points"]) in PAGE.read_text(encoding="utf-8")
