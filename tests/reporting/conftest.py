"""Runs that several tests of the reports look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.reported import made_up_run


@pytest.fixture(scope="session")
def many_labels_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with 77 labels; only reports may be written into it."""
    folder = tmp_path_factory.mktemp("runs") / "many"
    return made_up_run(folder, labels=[f"intent {n}" for n in range(77)], held_out=200)
