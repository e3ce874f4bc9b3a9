"""Records the runs, or runs them again and compares every bit.

Before code is moved, and after::

    python -m tests.trajectories record FILE [NAME ...]
    python -m tests.trajectories compare FILE [NAME ...]

On the same CPU with the same packages, code that only moved gives the same bits. The file in this
folder was recorded elsewhere, so record one's own from the commit to compare with. Exit code of
`compare`: 0 if all are identical to the bit, else 1.
"""

import os

# Before torch is imported: the order of every sum is that of one thread, and nothing is compiled.
os.environ.update(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", CUDA_VISIBLE_DEVICES="")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of every run's processes: what PEFT asks of transformers by an old name.
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.trajectories.runs import RUNS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trajectories", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    # No `choices`, which argparse would demand of an empty list as well.
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(RUNS)}")
    given = parser.parse_args()
    if unknown := set(given.names) - RUNS.keys():
        parser.error(f"no such run: {', '.join(sorted(unknown))} (there are {', '.join(RUNS)})")
    names = given.names or list(RUNS)
    if given.action == "record":
        record(given.file, names)
        return 0
    return compare(given.file, names)


def record(file: Path, names: list[str]) -> None:
    """Write what the runs give; where only some are asked for, the file's others stay."""
    kept = json.loads(file.read_text())["runs"] if len(names) < len(RUNS) and file.is_file() else {}
    for name in names:
        kept[name], seconds = perform(RUNS[name])
        print(f"{name}: recorded ({seconds:.1f} s)", flush=True)
    # A line for each run, so that a new recording shows which ones changed.
    recorded = {name: kept[name] for name in RUNS if name in kept}
    lines = ",\n".join(f'  "{name}": {json.dumps(found)}' for name, found in recorded.items())
    head = json.dumps(circumstances())
    file.write_text(f'{{\n "recorded_with": {head},\n "runs": {{\n{lines}\n }}\n}}\n')


def compare(file: Path, names: list[str]) -> int:
    """Print of every run whether it is what the file says; 1 if one is not."""
    contents = json.loads(file.read_text())
    for path, old, new in differences(contents["recorded_with"], circumstances()):
        print(f"Recorded with another {path}: {old}, here {new}. Bits may differ for that alone.")
    differing = 0
    for name in names:
        if name not in contents["runs"]:
            print(f"{name}: NOT RECORDED", flush=True)
            differing += 1
            continue
        found, seconds = perform(RUNS[name])
        first = next(differences(contents["runs"][name], found), None)
        verdict = "identical to the bit"
        if first is not None:
            differing += 1
            verdict = "DIFFERENT, first at {}: {} recorded, {} now".format(*first)
        print(f"{name}: {verdict} ({seconds:.1f} s)", flush=True)
    print(f"{len(names) - differing} of {len(names)} runs are identical to the bit.")
    return 1 if differing else 0


def perform(one: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """A run's result, as JSON gives it back, and its seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = json.loads(json.dumps(one(Path(folder))))
    return found, time.monotonic() - begin


def circumstances() -> dict[str, str]:
    """What the last bits depend on, besides this library."""
    packages = ("torch", "transformers", "accelerate", "peft", "tokenizers", "bitsandbytes")
    return {
        **{name: version(name) for name in packages},
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
    }


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Path, old and new value of everything that differs, in the old one's order."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(
                old.get(key, "nothing"), new.get(key, "nothing"), f"{path}/{key}" if path else key
            )
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{path}/{index}")
    # The text that stands for a float stands for all its bits, those of 0.0, -0.0 and NaN as well.
    elif repr(old) != repr(new):
        yield path, repr(old), repr(new)


if __name__ == "__main__":
    sys.exit(main())
