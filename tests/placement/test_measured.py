"""What the plan says today, beside what was measured on a GPU.

Run: python -m pytest tests/placement/test_measured.py
"""

import json
import re
from statistics import median

import pytest

from benchmarks.planning import GRID, PAGE, predicted, table_of_ranks, tables
from benchmarks.throughput import RESULTS
from lora_fsdp.placement import memory, timing
from tests.test_documentation import ROOT

DATA = ROOT / ".cache" / "default" / "airline_tweets.csv"
MEASURED = {
    file.stem.removeprefix("planning-"): json.loads(file.read_text(encoding="utf-8"))
    for file in sorted(RESULTS.glob("planning-*.json"))
}


def points_of(gpu):
    return MEASURED[gpu]["points"]


pytestmark = pytest.mark.skipif(
    not DATA.exists(), reason="needs the prepared default: lora-fsdp demo --prepare_only"
)


SOME = (
    "deepseek-7b-qv",
    "deepseek-7b-qv-long-4bit",
    "deepseek-7b-all-r64-long-again-4bit",
    "llama-1b-all-r64",
    "llama-1b-all-again",
)


@pytest.mark.parametrize(
    ("gpu", "name"), [(gpu, name) for gpu in MEASURED for name in SOME if name in points_of(gpu)]
)
def test_the_plan_says_what_is_stored(gpu, name, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the benchmarks find their data
    point = points_of(gpu)[name]
    now = predicted(GRID[name], device=MEASURED[gpu]["environment"]["device"], measured=point)
    # Otherwise: python -m benchmarks.planning --predict, which also writes the page's tables.
    assert now == point


@pytest.mark.parametrize("gpu", MEASURED)
def test_the_plan_is_as_good_as_it_is_said_to_be(gpu):
    points = points_of(gpu)
    memory = {name: abs(p["error_gb"]) for name, p in points.items() if "error_gb" in p}
    time = [abs(p["error_ms"]) for p in points.values() if "error_ms" in p]
    for name, error in memory.items():
        # Of large adapters' short rows the next smaller size is counted, whether or not it comes.
        assert error < (0.02 if "r64" in name and "long" not in name else 0.01), name
    assert median(memory.values()) < 0.002
    assert max(time) < 0.1


@pytest.mark.parametrize("gpu", MEASURED)
def test_the_documentation_has_every_point(gpu):
    assert tables(points_of(gpu)) in PAGE.read_text(encoding="utf-8")


def test_two_gpus(monkeypatch):
    """As the documentation says, and within what docs/speed.md says."""
    monkeypatch.chdir(ROOT)
    runs = json.loads((RESULTS / "h200-x2.json").read_text(encoding="utf-8"))["runs"]
    table = table_of_ranks(runs)
    assert table in PAGE.read_text(encoding="utf-8")
    errors = [
        [float(e) for e in re.findall(r"\(([+-][\d.]+)%\)", row)] for row in table.split("\n")
    ]
    errors = [found for found in errors if found]
    assert len(errors) == 6
    assert max(abs(memory) for memory, _ in errors) < 2
    assert max(abs(time) for _, time in errors) < 8


def test_the_page_has_the_constants():
    """Of the memory's and of the time's."""
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    launch, gather = 1e3 * timing._LAUNCH_SECONDS[True], 1e3 * timing._GATHER_SECONDS
    assert f"{launch:.1f} ms a layer, and {gather:.1f} ms each time FSDP gathers" in page
    assert f"workspaces of {memory.WORKSPACE / 1e9:.1f} GB" in page
