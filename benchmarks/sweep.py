"""The sweep of docs/sweeps.md: runs the page's command and keeps what it found.

    python -m benchmarks.sweep --write benchmarks/results/sweep-tweets.json

Needs the prepared default (`lora-fsdp demo --prepare_only`). The command is the page's own, so that
both stay one. Kept are the settings' scores, the conclusion, and the minutes it took; with
`--picture`, its picture.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import add_option, keep
from tests.support.documented import ROOT, commands_of, words_of

KEPT = ("metric", "adapters", "settings", "conclusion")


def page_command() -> str:
    """The page's sweep of real tweets."""
    [found] = [c for c in commands_of("docs/sweeps.md") if "sweep" in c and "--max_rows" in c]
    return found


def main() -> None:
    """Run it and keep what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, metavar="FILE", help="copy its picture there")
    add_option(parser)
    asked, swept = parser.parse_args(), page_command()
    words = words_of(swept)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "sweep"
        words[words.index("--output_dir") + 1] = str(output)
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "lora_fsdp", *words[1:]], cwd=ROOT, check=True)
        minutes = round((time.monotonic() - began) / 60, 1)
        found = json.loads((output / "report.json").read_text(encoding="utf-8"))
        if asked.picture is not None:
            shutil.copy(output / "report_figures" / "settings.svg", asked.picture)
    keep(
        asked.write,
        {"swept": swept, "minutes": minutes, **{name: found[name] for name in KEPT}},
    )


if __name__ == "__main__":
    main()
