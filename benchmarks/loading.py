"""How long a base takes to load, beside the time the disk takes to read its files.

    python -m benchmarks.loading FOLDER [--dtype float32] [--load_in_4bit]

Each way (`--ways`) runs three times (`--times`) in turn, in a process of its own, after the files
were dropped from the page cache (`posix_fadvise`, Linux); where that is not allowed, all read from
the cache alike. One JSON line a way: median seconds, gigabytes a second of the files, growth of the
peak of host memory (which counts the files' own pages).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.record import add_option, keep

WAYS = ("read", "stream", "from_pretrained")
_CHUNK = 16 * 2**20


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder."""
    return sorted(folder.glob("*.safetensors"))


def drop_from_cache(folder: Path) -> None:
    """Let the kernel forget the files' pages."""
    for file in weight_files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def peak_memory() -> int:
    """Of this process so far, in bytes."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def load(way: str, folder: Path, *, dtype: str, in_4bit: bool) -> dict[str, float]:
    """Load once; seconds and growth of the peak. What is imported does not count."""
    import torch

    from lora_fsdp.arguments import ModelArguments
    from lora_fsdp.base.loading import load_base
    from lora_fsdp.base.streaming import load_on_device

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    arguments = ModelArguments(str(folder), dtype=dtype, load_in_4bit=in_4bit)  # type: ignore[arg-type]
    if in_4bit:
        import lora_fsdp.base.four_bit  # noqa: F401
    drop_from_cache(folder)
    before, start = peak_memory(), time.perf_counter()
    if way == "read":
        for file in weight_files(folder):
            with file.open("rb", buffering=0) as stream:
                while stream.read(_CHUNK):
                    pass
    elif way == "stream":
        load_on_device(arguments, device=device)
    else:
        arguments.load_in_4bit = False
        load_base(arguments, device=device).to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "peak": peak_memory() - before}


def main() -> None:
    """Measure all ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="measure this one once, in this process")
    add_option(parser)
    asked = parser.parse_args()
    if asked.way:
        found = load(asked.way, asked.folder, dtype=asked.dtype, in_4bit=asked.load_in_4bit)
        print(json.dumps(found))
        return
    size = sum(file.stat().st_size for file in weight_files(asked.folder))
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in asked.ways}
    words = [str(asked.folder), "--dtype", asked.dtype]
    words += ["--load_in_4bit"] if asked.load_in_4bit else []
    for _ in range(asked.times):
        for way in asked.ways:
            command = [sys.executable, "-m", "benchmarks.loading", *words, "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[way].append(json.loads(done.stdout.strip().splitlines()[-1]))
    found = []
    for way, measured in runs.items():
        seconds = median(run["seconds"] for run in measured)
        found.append(
            {
                "way": way,
                "seconds": round(seconds, 2),
                "gb_per_second": round(size / seconds / 1e9, 2),
                "peak_growth_mb": round(median(run["peak"] for run in measured) / 1e6),
            }
        )
        print(json.dumps(found[-1]))
    keep(asked.write, {"files_mb": round(size / 1e6), "ways": found})


if __name__ == "__main__":
    main()
