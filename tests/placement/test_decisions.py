"""The table of decisions is what is decided today.

Run: python -m pytest tests/placement/test_decisions.py
"""

from tests.placement.decisions import TABLE, table


def test_the_table_is_what_is_decided():
    """Otherwise: python -m tests.placement.decisions, and say in the change why each cell moved."""
    assert table() == TABLE.read_text(encoding="utf-8")
