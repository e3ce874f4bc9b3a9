"""Recorded runs, run again: a changed computation is noticed.

Another CPU rounds otherwise, so here numbers need only be close. That code moved without changing
a bit is shown on one CPU, by a recording from before and `compare` (see `__main__.py`):

    python -m tests.trajectories record FILE
    python -m tests.trajectories compare FILE

Run: python -m pytest tests/trajectories
"""

import json
from pathlib import Path

import pytest

from tests.trajectories.runs import RUNS

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())["runs"]
# None with dropout, whose masks are not drawn alike on every CPU, and none in 4 bits or bfloat16,
# whose rounding is coarse.
CHECKED = (
    "one-process",
    "eager",
    "prefix-not-shared",
    "accumulation",
    "clipping-and-schedule",
    "shortened",
    "resumed-two-ranks-to-one",
    "free-text",
    "multiple-choice",
    "tied-embeddings",
    "qwen3",
    "gpt2",
)


def test_every_run_is_recorded():
    assert list(RECORDED) == list(RUNS)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CHECKED)
def test_same_numbers(name, tmp_path):
    found, recorded = RUNS[name](tmp_path), RECORDED[name]
    assert found["ranks_agree"]
    for part, names in (
        ("steps", ("step", "epoch", "loss", "grad_norm", "learning_rate")),
        # Not the other metrics: they jump where two answers are about as likely.
        ("evaluations", ("step", "epoch", "eval_loss")),
    ):
        assert len(found[part]) == len(recorded[part])
        for entry, before in zip(found[part], recorded[part], strict=True):
            for name in names:
                assert entry[name] == pytest.approx(before[name], rel=2e-4), (part, entry["step"])
    for entry, before in zip(found["log_likelihoods"], recorded["log_likelihoods"], strict=True):
        assert entry == pytest.approx(before, rel=2e-4)
