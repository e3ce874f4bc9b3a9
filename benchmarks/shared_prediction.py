"""Rows a second that `lora-fsdp predict` answers by 1, 2 and 4 processes of one machine.

    python -m benchmarks.shared_prediction                # SmolLM2-135M, an adapter made here

Each process has one core, and there is nothing to gain by more processes than cores. A process
counts from when the model is loaded (the command's own figure), and the time of the whole command
stands beside it. The answers of all must be the same file, to the byte.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.serving import TABLE, make_adapter
from lora_fsdp.data.tables import read_table

PROCESSES = (1, 2, 4)


def answer(adapter: Path, table: Path, output: Path, processes: int) -> dict[str, Any]:
    """One call of the command."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = ["--module", "lora_fsdp", "predict", table, "--adapter", adapter, "--output", output]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, words), "--chunk_rows", "32", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - began
    found = json.loads(done.stdout[done.stdout.index("{") :])
    return {"processes": processes, "rows": found["rows"], "seconds": round(seconds, 1)} | {
        "rows_per_second": found["rows_per_second"]
    }


def main() -> None:
    """Answer the table by each number of processes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, help="a finished run; one is made if none is given")
    parser.add_argument("--rows", type=int, default=512)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        adapter = given.adapter or make_adapter(folder / "run")
        read_table(str(TABLE)).head(given.rows)[["text"]].to_csv(folder / "rows.csv", index=False)
        outputs = [folder / f"by-{count}.csv" for count in PROCESSES]
        print(f"load before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
        print("| processes | rows/s | s of the command |\n| --- | --- | --- |")
        for count, output in zip(PROCESSES, outputs, strict=True):
            one = answer(adapter, folder / "rows.csv", output, count)
            print(f"| {count} | {one['rows_per_second']} | {one['seconds']} |", flush=True)
        if len({file.read_bytes() for file in outputs}) != 1:
            sys.exit("The answers differ.")
        print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
