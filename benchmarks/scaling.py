"""A simulation of step time and efficiency from 1 to 1,024 GPUs, by model, layout and network.

    python -m benchmarks.scaling                # the table, benchmarks/results/scaling.json
    python -m benchmarks.scaling --plot         # docs/images/scaling.svg as well

It needs no GPU: `lora_fsdp.placement.timing` and `lora_fsdp.placement.network` say how long a step
takes, as `lora-fsdp plan` does. What they say of one and two H200 stands beside measurements in
`benchmarks/results` (`measured_points`). Beyond eight GPUs nothing has been measured.

Assumed: H200s, eight a host; every GPU computes 4,096 tokens a step, however many there are; all
hosts of a run have one link to the others of the named speed, which carries 94 % of it; a message
takes 30 us from host to host; gathers hide behind computing where they are shorter, the adapter's
gradients never. A mixture of experts computes with its active experts, reads and gathers all.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from benchmarks.planning import PLACED, Point, predicted
from benchmarks.throughput import RESULTS
from benchmarks.workload import Workload
from lora_fsdp.data.workload import Work
from lora_fsdp.placement.gpus import GIGABIT, GPUS
from lora_fsdp.placement.hardware import usable_memory
from lora_fsdp.placement.layout import Layout
from lora_fsdp.placement.memory import LargestSequence, device_memory
from lora_fsdp.placement.network import (
    gathered_bytes,
    host_traffic,
    seconds_of_gradients,
    seconds_of_weights,
)
from lora_fsdp.placement.shape import ModelShape
from lora_fsdp.placement.timing import step_seconds
from lora_fsdp.planning.models import dense_config
from lora_fsdp.sizing.counting import build_on_meta, shape_of

PLOT = Path(__file__).resolve().parents[1] / "docs" / "images" / "scaling.svg"
FILE = RESULTS / "scaling.json"
GPU, PER_HOST = GPUS["H200-141GB"], 8
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LINKS = (10, 100, 400)
TOKENS = 4096
LAYOUTS = ("resident", "hybrid", "full shard")
ADAPTER = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

MODELS: dict[str, PretrainedConfig] = {
    "7B": LlamaConfig(
        vocab_size=102400,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=30,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "70B": dense_config(70e9),
    "235B MoE": Qwen3MoeConfig(  # as Qwen3-235B-A22B
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    "600 GB": dense_config(300e9),  # in bfloat16
}


@dataclass(frozen=True)
class Simulated:
    """A step on so many GPUs.

    Attributes:
        model, layout, link: what was simulated; the link in Gbit/s.
        gpus: how many.
        fits: whether a step's peak fits a GPU's memory.
        seconds: of an optimizer step.
        sent_bytes: that each host sends to others in it.
    """

    model: str
    layout: str
    link: int
    gpus: int
    fits: bool
    seconds: float
    sent_bytes: float


@functools.cache
def shapes(model: str) -> tuple[ModelShape, ModelShape]:
    """The model's sizes, and those of what a token is multiplied with."""
    import torch

    config = MODELS[model]
    skeleton = build_on_meta(config, dtype=torch.bfloat16, attention=None, trust_remote_code=False)
    shape = shape_of(skeleton, ADAPTER)
    if not isinstance(config, Qwen3MoeConfig):
        return shape, shape
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    unused = (config.num_experts - config.num_experts_per_tok) * expert
    active = replace(
        shape,
        layer_parameters=shape.layer_parameters - unused,
        linear_parameters=min(shape.linear_parameters, shape.layer_parameters - unused),
        parameters=shape.parameters - shape.layers * unused,
        idle_parameters=0,  # they are left out above
    )
    return shape, active


def simulate(model: str, layout: str, *, gpus: int, link: int) -> Simulated:
    """One step; `link` in Gbit/s."""
    shape, active = shapes(model)
    hosts = -(-gpus // PER_HOST)
    placed = Layout(
        ranks=gpus,
        resident_layers=shape.layers if layout == "resident" else 0,
        captured=layout == "resident",
        hosts=hosts,
        replicas=hosts if layout == "hybrid" else 1,
        recomputed=model != "7B",  # where the base leaves no room for activations
    )
    work = Work(
        steps=1,
        examples=8 * gpus,
        examples_per_rank=8,
        step_tokens=TOKENS,
        step_labels=16,
        largest_step=TOKENS,
        longest_example=512,
    )
    # Computing and launching, as on one GPU; then what the ranks wait for of one another.
    alone = replace(placed, hosts=1)
    computing = step_seconds(active, alone, work, GPU, sequence_tokens=TOKENS)
    traffic = host_traffic(shape, placed, sequences=1.0)
    gathering = gathered_bytes(shape, placed) * (1 - 1 / placed.sharers) / GPU.link
    speed = link * GIGABIT
    waiting = max(gathering, seconds_of_weights(traffic, placed, link=speed))
    seconds = max(computing, waiting) + seconds_of_gradients(traffic, placed, link=speed)
    largest = LargestSequence(tokens=TOKENS, labels=16)
    needed = device_memory(shape, placed, largest).allocated
    fits = needed <= usable_memory(GPU.memory)
    return Simulated(model, layout, link, gpus, fits, seconds, traffic.total)


def everything() -> Iterator[Simulated]:
    """Every model, layout, number of GPUs and network."""
    for model in MODELS:
        for layout in LAYOUTS:
            for link in LINKS:
                for gpus in COUNTS:
                    yield simulate(model, layout, gpus=gpus, link=link)


def efficiency(found: Simulated) -> float | None:
    """Work per GPU and second, beside that on the fewest GPUs of one host that hold the model in
    any layout; `None` where none do, or this does not fit.
    """
    if not found.fits:
        return None
    inside = [gpus for gpus in COUNTS if gpus <= PER_HOST]
    for gpus in inside:
        there = [simulate(found.model, one, gpus=gpus, link=found.link) for one in LAYOUTS]
        if fitting := [one.seconds for one in there if one.fits]:
            return min(fitting) / found.seconds
    return None


def measured_points() -> list[dict[str, Any]]:
    """Milliseconds of a step on one and two H200, measured, and by the same functions."""
    points = []
    stored = json.loads((RESULTS / "planning-h200.json").read_text(encoding="utf-8"))["points"]
    for name, point in stored.items():
        if "predicted_ms" in point and "measured_ms" in point:
            points.append({"name": f"1 x H200, {name}", "gpus": 1} | _pair(point))
    runs = json.loads((RESULTS / "h200-x2.json").read_text(encoding="utf-8"))["runs"]
    for run in runs:
        work, ranks = Workload(**run["workload"]), run["processes"]
        for arm, result in run["arms"].items():
            if arm not in PLACED or ranks == 1:
                continue
            title, changes = PLACED[arm]
            changes = {**changes, "whole_head": "the output head stays" in result["plan"]}
            found = predicted(
                Point(work), device=run["environment"]["device"], ranks=ranks,
                placed=functools.partial(replace, **changes),
                measured={"measured_ms": result["step_ms"], "row_tokens": result["row_tokens"]},
            )  # fmt: skip
            name = f"2 x H200, {title}{' in 4 bits' * work.in_4bit}, {work.rows}"
            points.append({"name": name, "gpus": 2} | _pair(found))
    return points


def _pair(point: dict[str, Any]) -> dict[str, float]:
    return {"measured_ms": point["measured_ms"], "simulated_ms": point["predicted_ms"]}


def table(found: list[Simulated]) -> str:
    """Efficiency by GPUs: a line for each model, layout and network that fits."""
    counts = [gpus for gpus in COUNTS if gpus >= PER_HOST]
    head = ["model", "layout", "Gbit/s a host", *(f"{gpus:,}" for gpus in counts), "sent a step"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for model in MODELS:
        for layout in LAYOUTS:
            for link in LINKS:
                row = [
                    one
                    for one in found
                    if (one.model, one.layout, one.link) == (model, layout, link)
                    and one.gpus in counts
                ]
                if not row[-1].fits:
                    continue
                shares = [efficiency(one) for one in row]
                cells = ["" if share is None else f"{100 * share:.0f} %" for share in shares]
                sent = f"{row[-1].sent_bytes / 1e6:,.0f} MB"
                lines.append(f"| {' | '.join([model, layout, str(link), *cells, sent])} |")
    return "\n".join(lines) + "\n"


def plot(found: list[Simulated], file: Path) -> None:
    """Efficiency over GPUs, a panel for each model."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "scaling"  # the same file for the same numbers
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(MODELS), figsize=(15, 3.6), sharey=True)
    colours = {"resident": "C2", "hybrid": "C0", "full shard": "C3"}
    lines = {10: ":", 100: "--", 400: "-"}
    for panel, model in zip(panels, MODELS, strict=True):
        for layout in LAYOUTS:
            for link in LINKS:
                chosen = [
                    (one.gpus, efficiency(one))
                    for one in found
                    if (one.model, one.layout, one.link) == (model, layout, link) and one.fits
                ]
                if chosen:
                    label = f"{layout}, {link} Gbit/s"
                    panel.plot(
                        *zip(*chosen, strict=True), lines[link], c=colours[layout], label=label
                    )
        panel.set_xscale("log", base=2)
        panel.set_xticks(COUNTS[::2], [str(gpus) for gpus in COUNTS[::2]])
        panel.set_title(model)
        panel.set_xlabel("GPUs (H200, 8 a host)")
        panel.set_ylim(0, 1.05)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("efficiency (simulated)")
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    panels[-1].legend(
        handles.values(), handles, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help=f"write {PLOT.name} as well")
    given = parser.parse_args()
    found = list(everything())
    print(table(found))
    rows = [asdict(one) | {"efficiency": efficiency(one)} for one in found]
    FILE.write_text(json.dumps({"simulated": rows}, indent=1) + "\n", encoding="utf-8")
    for point in measured_points():
        error = point["simulated_ms"] / point["measured_ms"] - 1
        print(
            f"{point['name']}: {point['measured_ms']} ms measured, {100 * error:+.1f} % simulated"
        )
    if given.plot:
        plot(found, PLOT)


if __name__ == "__main__":
    main()
