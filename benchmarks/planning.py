"""The plan's memory and time beside measured ones, over a grid of models and settings.

    python -m benchmarks.planning
    python -m benchmarks.planning --points deepseek-7b-qv llama-1b-long-4bit
    python -m benchmarks.planning --predict benchmarks/results/planning-h100.json

Needs a GPU. Every point is a process of its own and prints one line; the table is written to
`benchmarks/results/`. While one has the GPU, the next ones import. `--predict` measures nothing:
it sets a file's measurements beside what the plan says now, and writes docs/planning.md's tables.
Errors are those of `docs/planning.md`: (predicted - measured) / measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.arms import lora
from benchmarks.throughput import RESULTS, environment
from benchmarks.workload import (
    SEED,
    SHAPES,
    Workload,
    load_tokenizer,
    longest_length,
    task_and_examples,
)
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.workload import measure_work
from lora_fsdp.placement.gpus import parse_gpus
from lora_fsdp.placement.layout import Layout
from lora_fsdp.placement.memory import peak_allocated
from lora_fsdp.placement.sequences import largest_sequence
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.placement.timing import step_seconds
from lora_fsdp.sizing.counting import build_on_meta, shape_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
# The test compares the page with the file.
_MARK, _END = "<!-- held: tests/placement/test_measured.py; {} -->", "<!-- end -->"
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Point:
    """A place in the grid: what is trained, with which options of `FineTuningArguments`."""

    work: Workload
    options: dict[str, Any] = field(default_factory=dict)


def _grid() -> dict[str, Point]:
    found = {}
    for model in ("deepseek-7b", "llama-1b"):
        for rank, targets, name in (
            (8, ["q_proj", "v_proj"], "qv"),
            (64, ["q_proj", "v_proj"], "qv-r64"),
            (8, _ALL, "all"),
            (64, _ALL, "all-r64"),
        ):
            for in_4bit, bits in ((False, ""), (True, "-4bit")):
                tweets = Workload(
                    model=model, rank=rank, targets=targets, steps=20, in_4bit=in_4bit, scored=0
                )
                long = replace(tweets, steps=12, rows="long", examples=1)
                again = {"gradient_checkpointing": True}
                found |= {
                    f"{model}-{name}{bits}": Point(tweets),
                    f"{model}-{name}-long{bits}": Point(long),
                    f"{model}-{name}-again{bits}": Point(tweets, again),
                    f"{model}-{name}-long-again{bits}": Point(long, again),
                }
    return found


GRID = _grid()


def main() -> None:
    """Run the points; what was measured is written after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", nargs="+", choices=list(GRID), default=list(GRID))
    parser.add_argument("--seconds", type=float, default=180.0, help="a point may take")
    parser.add_argument("--started", type=int, default=4, help="points started at once")
    parser.add_argument("--output", default="planning", help="name of the file in results/")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="measured before")
    asked = parser.parse_args()
    if asked.predict:
        _predict_again(asked.predict)
        return
    report: dict[str, Any] = {"environment": environment(), "points": {}}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.started) as pool:
        started = [
            (name, pool.submit(_measured, name, folder=Path(folder), seconds=asked.seconds))
            for name in asked.points
        ]
        for name, running in started:
            result = running.result()
            report["points"][name] = result
            print(line(name, result), flush=True)
            RESULTS.mkdir(exist_ok=True)
            file = RESULTS / f"{asked.output}.json"
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(summary(report["points"]))


def _measured(name: str, *, folder: Path, seconds: float) -> dict[str, Any]:
    point, output = GRID[name], folder / f"{name}.json"
    asked = {
        "kind": "ours",
        "work": asdict(point.work),
        "options": {"step": "auto", **point.options},
        "output": str(output),
        "folder": str(output.with_suffix(".run")),
        "turn": str(folder / "turn.lock"),
    }
    command = [sys.executable, "-m", "benchmarks.arms", json.dumps(asked)]
    try:
        done = subprocess.run(command, timeout=seconds, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {seconds:.0f} s"}
    if not output.is_file():
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    result = json.loads(output.read_text())
    predicted = result.get("predicted")
    if not predicted:
        return {"failed": "nothing was predicted: it needs a GPU that the plan knows"}
    found = {
        "measured_gb": result["peak_gb"],
        "measured_ms": result["step_ms"],
        "row_tokens": result["row_tokens"],
        "plan": result["plan"],
    }
    step = predicted["training_seconds"] / point.work.steps
    return _beside(found, gigabytes=predicted["peak_memory_gb"], milliseconds=1e3 * step)


def _beside(measured: dict[str, Any], *, gigabytes: float, milliseconds: float) -> dict[str, Any]:
    """What was measured, with predictions and relative errors."""
    found = dict(measured)
    for unit, predicted in (("gb", gigabytes), ("ms", milliseconds)):
        if f"measured_{unit}" in measured:
            found[f"predicted_{unit}"] = round(predicted, 2)
            found[f"error_{unit}"] = round(predicted / measured[f"measured_{unit}"] - 1, 4)
    return found


def _predict_again(file: Path) -> None:
    """Write the predictions of today beside a file's measurements."""
    report = json.loads(file.read_text(encoding="utf-8"))
    if "runs" in report:
        _write_into_page(file, table_of_ranks(report["runs"]))
        return
    for name, result in report["points"].items():
        if "failed" not in result:
            now = predicted(GRID[name], device=report["environment"]["device"], measured=result)
            report["points"][name] = result = now
        print(line(name, result), flush=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _write_into_page(file, tables(report["points"]))
    print(summary(report["points"]))


def _write_into_page(file: Path, table: str) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_MARK.format(file.name))
    _, end, after = rest.partition(_END)
    if end:
        text = f"{before}{_MARK.format(file.name)}\n{table}{_END}{after}"
        PAGE.write_text(text, encoding="utf-8")


def predicted(
    point: Point,
    *,
    device: str,
    measured: dict[str, Any],
    ranks: int = 1,
    placed: Callable[[Layout], Layout] = lambda placement: placement,
) -> dict[str, Any]:
    """As the trainer predicts it, from the same examples; `placed` changes where the base lies."""
    work = point.work
    examples = _encoded(work.rows, data=work.data)
    training = {
        "per_device_train_batch_size": work.examples, "gradient_accumulation_steps": 1,
        "max_steps": work.steps, "seed": SEED, "data_seed": None, "max_tokens_per_row": None,
    }  # fmt: skip
    asked = measure_work(training, examples, [], ranks=ranks, share_prefix=True)
    shape = _counted(work.model, rank=work.rank, targets=tuple(work.targets), dropout=work.dropout)
    placement = placed(
        Layout(
            ranks,
            shape.layers,
            quantized=work.in_4bit,
            recomputed=point.options.get("gradient_checkpointing", False),
        )
    )
    largest = largest_sequence(asked, measured["row_tokens"])
    step = step_seconds(
        shape,
        placement,
        asked,
        parse_gpus(device.split()[1])[1],
        sequence_tokens=measured["row_tokens"],
    )
    memory = peak_allocated(shape, placement, largest)
    return _beside(measured, gigabytes=memory / 1e9, milliseconds=1e3 * step)


# Points of the grid share their examples and, but for what is stored and recomputed, their shape.
@functools.cache
def _encoded(rows: str, *, data: str) -> list[EncodedExample]:
    work = Workload(rows=rows, data=data)
    task, examples = task_and_examples(work)
    encoder = Encoder(load_tokenizer(work), task=task, max_length=longest_length(work))
    return encoder.encode(examples)


@functools.cache
def _counted(model: str, *, rank: int, targets: tuple[str, ...], dropout: float) -> ModelShape:
    adapter = lora(Workload(model, rank=rank, targets=list(targets), dropout=dropout))
    return shape_of(build_on_meta(SHAPES[model]), adapter)


PLACED = {
    "ours-full-shard": ("full shard", {"resident_layers": 0}),
    "ours-half-resident": ("15 of 30 layers resident", {"resident_layers": 15}),
    "ours-till-backward": ("till backward", {"resident_layers": 0, "kept_until_backward": True}),
    "ours-resident": ("resident", {}),
}


def table_of_ranks(runs: list[dict[str, Any]]) -> str:
    """What docs/planning.md shows of runs of `benchmarks.throughput` on several GPUs."""
    lines = ["| 7B, q, v, r 8 | GB of a GPU | ms |", "| --- | --- | --- |"]
    for run in runs:
        work, ranks = Workload(**run["workload"]), run["processes"]
        for name, arm in run["arms"].items():
            if name not in PLACED or ranks == 1:
                continue
            title, changes = PLACED[name]
            # As the run said where the base lay.
            changes = {**changes, "whole_head": "the output head stays" in arm["plan"]}
            found = predicted(
                Point(work), device=run["environment"]["device"], ranks=ranks,
                placed=functools.partial(replace, **changes),
                measured={
                    "measured_gb": arm["peak_gb"], "measured_ms": arm["step_ms"],
                    "row_tokens": arm["row_tokens"],
                },
            )  # fmt: skip
            setting = f"{title}{' in 4 bits' * work.in_4bit}, {work.rows}"
            lines.append(f"| {setting} | {_cell(found, 'gb')} | {_cell(found, 'ms')} |")
    return "\n" + "\n".join(lines) + "\n\n"


def line(name: str, result: dict[str, Any]) -> str:
    """One point of the table."""
    if "failed" in result:
        return f"{name:<32} {result['failed']}"
    cells = [
        f"{result[f'predicted_{unit}']:9.2f} {result[f'measured_{unit}']:9.2f} {unit} "
        f"{result[f'error_{unit}']:+6.1%}"
        for unit in ("gb", "ms")
        if f"error_{unit}" in result
    ]
    return f"{name:<32} " + "  ".join(cells)


def tables(points: dict[str, dict[str, Any]]) -> str:
    """What docs/planning.md shows of a file's points."""
    parts = []
    for model, title in (("deepseek-7b", "7B"), ("llama-1b", "1B")):
        names = [name for name in GRID if name.startswith(model) and not name.endswith("-4bit")]
        lines = [
            f"| {title} | bf16: GB | ms | 4-bit: GB | ms |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name in names:
            cells = [
                _cell(points.get(point, {}), unit)
                for point in (name, f"{name}-4bit")
                for unit in ("gb", "ms")
            ]
            if any(cells):
                lines.append(f"| {_setting(GRID[name])} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n" + "\n\n".join(parts) + f"\n\n{summary(points)}\n\n"


def _cell(result: dict[str, Any], unit: str) -> str:
    """Predicted, measured and the error."""
    if f"error_{unit}" not in result:
        return ""
    places = 2 if unit == "gb" else 1
    predicted, measured = (result[f"{kind}_{unit}"] for kind in ("predicted", "measured"))
    return f"{predicted:.{places}f}, {measured:.{places}f} ({result[f'error_{unit}']:+.1%})"


def _setting(point: Point) -> str:
    work = point.work
    targets = "all linear" if len(work.targets) > 2 else "q, v"
    return f"{targets}, r {work.rank}, {work.rows}" + ", recomputed" * bool(point.options)


def summary(points: dict[str, dict[str, Any]]) -> str:
    """Median and largest error."""
    lines = []
    for kind, what in (("gb", "Memory"), ("ms", "Time")):
        errors = [abs(r[f"error_{kind}"]) for r in points.values() if f"error_{kind}" in r]
        if errors:
            lines.append(
                f"{what} of {len(errors)} points: median {statistics.median(errors):.1%}, "
                f"at most {max(errors):.1%}."
            )
    return "\n".join(lines) or "nothing was measured"


if __name__ == "__main__":
    main()
