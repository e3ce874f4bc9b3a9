"""The source article's job, from the command line to the report, with a base of its shape.

    python -m benchmarks.whole_job --gpus 2 --output job.json

The base (7B, random weights, bfloat16) is made first, in `--folder`; the clock runs around
`lora-fsdp train` alone, with the article's recipe: 5,000 tweets, three epochs, dropout 0.1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import Workload, load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "recipes" / "deepseek-7b-article.yaml"


def make_base(folder: Path, *, model: str, dtype: str) -> None:
    """A model folder with random weights, and a tokenizer."""
    work = Workload(model=model, dtype=dtype)
    load_model(work).save_pretrained(folder)
    load_tokenizer(work).save_pretrained(folder)


def command(base: Path, run: Path, *, gpus: int, rehearse: bool) -> list[str]:
    """Of the job, after the interpreter."""
    words = ["-m", "lora_fsdp", "train", "--config", str(RECIPE)]
    words += ["--data_file", str(ROOT / Workload().data / "airline_tweets.csv")]
    words += ["--model_name_or_path", str(base), "--output_dir", str(run)]
    words += ["--num_processes", str(gpus)]
    if rehearse:
        words += ["--accelerate_config", "fsdp2_cpu", "--dtype", "float32", "--max_rows", "64"]
        words += ["--num_train_epochs", "1", "--per_device_train_batch_size", "2"]
        words += ["--gradient_accumulation_steps", "1"]
    return words


def main() -> None:
    """Make the base, run the job, write what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True, help="for the base and the run")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="a tiny base, on the CPU")
    asked = parser.parse_args()
    base, run = asked.folder / "base", asked.folder / "run"
    shape = ("tiny", "float32") if asked.rehearse else ("deepseek-7b", "bfloat16")
    make_base(base, model=shape[0], dtype=shape[1])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    words = command(base, run, gpus=asked.gpus, rehearse=asked.rehearse)
    variables = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], env=variables, check=True)
    wall = time.perf_counter() - began
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    kept = ("training_seconds", "seconds_by_part", "plan", "peak_memory_gb", "steps")
    found: dict[str, Any] = {"wall_seconds": round(wall, 2)}
    found |= {name: metrics[name] for name in kept if name in metrics}
    asked.output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
