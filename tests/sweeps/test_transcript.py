"""What docs/sweeps.md says that three seeds print is what they print.

Run: python -m pytest -m slow tests/sweeps/test_transcript.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documented import ROOT, commands_of, words_of
from tests.support.transcripts import check
from tests.test_default import needs_model, needs_table

# The page's command, and what its sentence adds.
COMMAND = "lora-fsdp train --seeds 3 --max_rows 100"


@pytest.mark.slow
@pytest.mark.distributed
@needs_model
@needs_table
def test_three_seeds_print_what_the_page_says(tmp_path: Path) -> None:
    [written] = [c for c in commands_of("docs/sweeps.md") if "train" in c and "--seeds 3" in c]
    words = [*words_of(written)[1:], "--max_rows", "100"]
    words[words.index("--output_dir") + 1] = str(tmp_path / "seeds")
    done = subprocess.run(
        [sys.executable, "-m", "lora_fsdp", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    assert check(COMMAND, done.stdout) == []
