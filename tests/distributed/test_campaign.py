"""What the campaign of lost hosts is judged by.

Run: python -m pytest tests/distributed/test_campaign.py
The campaign itself, as root: python -m tests.distributed.campaign --kills 100
"""

from __future__ import annotations

import pytest

from tests.support.elastic_run import Sizes, check_ledger

SIZES = Sizes(rows=4, epochs=1, examples=2)


def line(step, attempt, rows):
    return {"step": step, "attempt": attempt, "rows": rows, "ranks": 1}


def test_a_ledger_counts_the_last_attempt_of_a_step():
    check_ledger([line(0, 1, [0, 1]), line(1, 1, [2, 3]), line(1, 2, [3, 2])], SIZES)


@pytest.mark.parametrize("last", [[1, 2], [2], [2, 3, 0]])
def test_a_ledger_that_is_not_exact(last):
    with pytest.raises(AssertionError):
        check_ledger([line(0, 1, [0, 1]), line(1, 1, [2, 3]), line(1, 2, last)], SIZES)
