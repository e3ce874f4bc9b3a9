"""Examples per second of this library and of its peers, on the same examples a step.

    python -m benchmarks.throughput --model deepseek-7b --examples 8
    python -m benchmarks.throughput --examples 32 --arms trl-padding-free ours-graph
    python -m benchmarks.throughput --model deepseek-7b --rows long --examples 1
    python -m benchmarks.throughput --processes 2 --arms trl-fsdp2 ours-fsdp2 ours-resident

Every arm is a process (or one a GPU) of its own and prints one line of the table; results and
versions are written to `benchmarks/results/`. Ratios are against the fastest arm of TRL that
trained on the same examples. Before it is timed, an arm computes the first step's gradients of a
small model in float32; an arm whose gradients are not those of `ours-eager` gets no ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.workload import SHAPES, Workload

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Arm:
    """A way to train: which of `benchmarks.arms`, with which options, under which YAML."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    yaml: str | None = None
    yaml_options: tuple[str, ...] = ()


_TRL = {"gradient_checkpointing": False, "logging_nan_inf_filter": False}
_FREE = {**_TRL, "padding_free": True}
_PACKED = {**_TRL, "packing": True, "per_device_train_batch_size": 1}
_SHARDED = {"resident_layers": "none", "allow_fsdp_on_one_process": True}
ARMS = {
    "article": Arm("article"),
    "trl-defaults": Arm("trl"),
    "trl-no-checkpointing": Arm("trl", {"gradient_checkpointing": False}),
    "trl-no-nan-filter": Arm("trl", _TRL),
    "trl-padding-free": Arm("trl", _FREE),
    "trl-packing": Arm("trl", _PACKED),
    "trl-liger": Arm("trl", {**_FREE, "use_liger_kernel": True}),
    "trl-compiled": Arm("trl", {**_TRL, "torch_compile": True, "pad_to_multiple_of": 64}),
    "trl-ddp": Arm("trl", {**_TRL, "ddp_find_unused_parameters": False}, "ddp.yaml"),
    "trl-fsdp2": Arm("trl", _TRL, "fsdp2.yaml"),
    "trl-fsdp2-padding-free": Arm("trl", _FREE, "fsdp2.yaml"),
    "ours-eager": Arm("ours", {"step": "eager"}),
    "ours-fused": Arm("ours", {"step": "fused"}),
    "ours-compiled": Arm("ours", {"step": "compiled"}),
    "ours-graph": Arm("ours", {"step": "graph"}),
    "ours-auto": Arm("ours"),
    "ours-full-shard": Arm("ours", _SHARDED, "fsdp2.yaml"),
    "ours-full-shard-graph": Arm("ours", {**_SHARDED, "step": "graph"}, "fsdp2.yaml"),
    "ours-till-backward": Arm(
        "ours", _SHARDED, "fsdp2.yaml", ("--fsdp_reshard_after_forward", "false")
    ),
    "ours-half-resident": Arm("ours", {**_SHARDED, "resident_layers": "15"}, "fsdp2.yaml"),
    "ours-resident": Arm("ours", {**_SHARDED, "resident_layers": "all"}, "fsdp2.yaml"),
}
USUAL = [name for name, arm in ARMS.items() if arm.yaml is None and name != "ours-auto"]


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="deepseek-7b", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--data", default=".cache/default", help="the prepared default's folder")
    parser.add_argument("--examples", type=int, default=8, help="examples a step and process")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rows", choices=["tweets", "long"], default="tweets")
    parser.add_argument("--scored", type=int, default=1000, help="held-out tweets that are scored")
    parser.add_argument("--in-4bit", action="store_true", help="the base in 4 bits; ours only")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=USUAL, choices=list(ARMS), metavar="ARM")
    parser.add_argument("--time-out", type=float, default=240.0, help="seconds an arm may take")
    parser.add_argument(
        "--without-gradients", action="store_true", help="do not compare gradients: no ratios"
    )
    parser.add_argument(
        "--without-ceiling", action="store_true", help="do not measure the matmul throughput"
    )
    parser.add_argument("--name", help="of the results' file")
    asked = parser.parse_args()
    work = Workload(
        model=asked.model,
        data=asked.data,
        examples=asked.examples,
        steps=asked.steps,
        dropout=asked.dropout,
        rows=asked.rows,
        in_4bit=asked.in_4bit,
        scored=asked.scored,
    )
    report: dict[str, Any] = {
        "workload": asdict(work),
        "processes": asked.processes,
        "environment": environment(),
        "ceiling_tflops": {},
        "arms": {},
    }
    name = asked.name or f"{asked.model}-{asked.rows}-{asked.examples}x{asked.processes}"
    with tempfile.TemporaryDirectory() as folder:
        compared = [] if asked.without_gradients else asked.arms
        differences = _gradient_differences(work, compared, Path(folder))
        for arm in asked.arms:
            result = _run(work, arm, Path(folder), asked)
            _note_gradients(result, differences.get(arm))
            report["arms"][arm] = result
            _write(report, name)  # what was measured is kept, whatever comes after
            print(_line(arm, result), flush=True)
    if not asked.without_ceiling:
        report["ceiling_tflops"] = _ceiling(work, report["arms"], processes=asked.processes)
    _write(report, name)
    print(table(report))


def _write(report: dict[str, Any], name: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Device and versions."""
    packages = ("torch", "transformers", "accelerate", "peft", "trl")
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor(),
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def table(report: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    arms: dict[str, dict[str, Any]] = report["arms"]
    peer = best_peer(arms)
    title = f"{report['workload']['model']}, {report['environment']['device']}"
    head = (
        "arm", "ex/s", "x TRL", "tok/s", "TFLOP/s", "of ceiling", "step ms", "host ms", "peak GB",
        "1st step s", "loss", "grad norms",
    )  # fmt: skip
    lines = [
        f"{title}: {report['workload']['examples']} examples a step and process, "
        f"{report['processes']} process(es), dropout {report['workload']['dropout']}",
        "| " + " | ".join(head) + " |",
        "| --- " * len(head) + "|",
    ]
    for name, arm in arms.items():
        if "failed" in arm:
            lines.append(f"| {name} | {arm['failed']} |" + " |" * (len(head) - 2))
            continue
        ratio = "-"
        if peer and arm.get("gradients_agree"):
            ratio = f"{arm['examples_per_second'] / arms[peer]['examples_per_second']:.2f}"
        rate = tflops(arm, report["processes"])
        ceiling = report["ceiling_tflops"].get(name)
        norms = arm["grad_norms"]
        cells = (
            name, arm["examples_per_second"], ratio, arm["tokens_per_second"], f"{rate:.0f}",
            f"{rate / ceiling:.0%}" if ceiling else "-", arm["step_ms"], arm["host_ms"],
            arm["peak_gb"], arm["first_step_s"],
            f"{arm['first_loss']:.3f} to {arm['last_loss']:.3f}",
            f"{min(norms):.3g} to {max(norms):.3g}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        if "scored_per_second" in arm:
            share = arm["scored_per_second"] / arm["examples_per_second"]
            lines[-1] += f" scores {arm['scored_per_second']} examples/s ({share:.2f} x training)"
    return "\n".join(lines)


def best_peer(arms: dict[str, dict[str, Any]]) -> str | None:
    """TRL's fastest arm among those that trained on the same examples with the same gradients."""
    known = [
        name
        for name, arm in arms.items()
        if name.startswith("trl") and "failed" not in arm and arm["gradients_agree"]
    ]
    return max(known, key=lambda name: arms[name]["examples_per_second"], default=None)


def tflops(arm: dict[str, Any], processes: int) -> float:
    """Achieved on each GPU: 4 per parameter and token that is no padding."""
    tokens = arm["computed_tokens_per_step"] / processes
    return float(4 * arm["parameters"] * tokens / arm["step_ms"] / 1e9)


def _run(work: Workload, name: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    output = folder / f"{name}.json"
    failure = _launch(work, name, output=output, processes=asked.processes, time_out=asked.time_out)
    if failure or not output.exists():
        return {"failed": failure or "no result"}
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def _note_gradients(result: dict[str, Any], difference: float | None) -> None:
    same_rows = result.get("examples_hash") != "packed"
    result["gradient_difference"] = difference
    result["gradients_agree"] = bool(same_rows and difference is not None and difference < 1e-4)


def _gradient_differences(work: Workload, arms: list[str], folder: Path) -> dict[str, float | None]:
    """How far each arm's gradients on the small model are from `ours-eager`'s; all at once."""
    if not arms:
        return {}
    names = list(dict.fromkeys(["ours-eager", *arms]))
    files = {name: folder / f"{name}.safetensors" for name in names}
    with ThreadPoolExecutor(len(names)) as pool:
        for name in names:
            pool.submit(_launch, work, name, gradient=files[name], processes=1, time_out=150.0)
    return {name: _difference(files["ours-eager"], files[name]) for name in arms}


def _difference(one: Path, other: Path) -> float | None:
    """Largest relative difference of a gradient tensor."""
    if not one.exists() or not other.exists():
        return None
    a, b = load_file(one), load_file(other)
    if a.keys() != b.keys() or not all(t.abs().sum() > 0 for t in a.values()):
        return None
    return max(float((a[k] - b[k]).norm() / a[k].norm()) for k in a)


def _launch(
    work: Workload,
    name: str,
    *,
    processes: int,
    time_out: float,
    output: Path | None = None,
    gradient: Path | None = None,
) -> str | None:
    """Run an arm; returns why it failed, or `None`."""
    arm = ARMS[name]
    asked = {"kind": arm.kind, "work": asdict(work), "options": arm.options}
    asked |= {"output": str(output), "gradient": str(gradient) if gradient else None}
    # The same for all ranks.
    asked["folder"] = str((output or gradient or Path()).with_suffix(".run"))
    launcher = [sys.executable, "-m", "benchmarks.arms"]
    environment = {**os.environ, "ARM_STARTED": str(time.time())}
    if arm.kind == "article":  # as its author starts it; without a launcher there is no FSDP
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(processes), "-m", "benchmarks.arms"),
        ]
    elif gradient is None and (arm.yaml or processes > 1):
        launcher = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(CONFIGS / (arm.yaml or "single.yaml"))),
            *("--num_processes", str(processes), *arm.yaml_options, "-m", "benchmarks.arms"),
        ]
    try:
        done = subprocess.run(
            [*launcher, json.dumps(asked)],
            env=environment, timeout=time_out, check=False, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not finished within {time_out:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    print("\n".join(lines[-15:]), file=sys.stderr)
    return next((line for line in reversed(lines) if "Error" in line), "failed")[:200]


def _line(name: str, result: dict[str, Any]) -> str:
    shown = {k: v for k, v in result.items() if k not in ("plan", "grad_norms")}
    return f"{name}: {json.dumps(shown)}"


def _ceiling(
    work: Workload, results: dict[str, dict[str, Any]], *, processes: int
) -> dict[str, float]:
    """The matmul throughput at the sequence length of each arm, measured now."""
    if not torch.cuda.is_available() or work.model not in SHAPES:
        return {}
    lengths = {
        name: round(arm["computed_tokens_per_step"] / processes)
        for name, arm in results.items()
        if "failed" not in arm
    }
    command = [sys.executable, "-m", "benchmarks.ceiling", work.model]
    rounded = {name: min(max(64, length), 8192) for name, length in lengths.items()}
    done = subprocess.run(
        [*command, *map(str, sorted(set(rounded.values())))],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    rates = json.loads(done.stdout.splitlines()[-1])
    return {name: round(rates[str(length)], 1) for name, length in rounded.items()}


if __name__ == "__main__":
    main()
