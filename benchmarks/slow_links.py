"""Step time of the layouts over a slow network between two hosts, measured beside the prediction.

    python -m benchmarks.slow_links                 # as root, on Linux: 100 and 1,000 Mbit/s

Two hosts are made of network namespaces, two ranks each (gloo, on this machine's CPU), and what
leaves a host is limited by `tc` (a token bucket). The model has 3.9 M parameters in float32, random
weights; a step packs its examples into one sequence a rank.

Predicted is what `lora-fsdp plan --link` and `benchmarks.scaling` add to a step for the network, by
the same functions (`lora_fsdp.placement.network`): the base's weights, behind which a step
computes, and the adapter's gradients. How long the step computes no prediction knows for a CPU: it
is the same layout's step without a limit. Steps vary with whatever else the machine does: the
median counts, and the load is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from lora_fsdp.placement.gpus import GIGABIT
from lora_fsdp.placement.network import seconds_of_gradients, seconds_of_weights
from tests.support.hosts import Host, hosts, why_no_hosts
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_trainer

CPU = {"ACCELERATE_USE_CPU": "true"}
LAYOUTS = {
    "resident": CPU,
    "hybrid": launch_environment("fsdp2_hosts.yaml") | CPU,
    "full shard": launch_environment("fsdp2.yaml") | CPU,
}
RANKS = 4
_LEFT_OUT = 2  # the first steps, which also check and warm up


@dataclass(frozen=True)
class Measured:
    """A layout's step over a network.

    Attributes:
        layout: its name.
        megabits: a second that leave a host; `None` = no limit.
        seconds: of a step, the median.
        sent_bytes: that the first host has sent in a step, with all headers.
        predicted_bytes: that it was to send.
        predicted_seconds: of a step, from the one without a limit; `None` = that one.
    """

    layout: str
    megabits: int | None
    seconds: float
    sent_bytes: float
    predicted_bytes: float
    predicted_seconds: float | None


def write_model(folder: Path) -> None:
    """A small Llama, large enough that its shards take longer on the network than its matmuls."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


class Steps(TrainerCallback):
    """When each step begins, and what its host has sent until then."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.sent: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it."""
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        [line] = [line for line in lines if line.strip().startswith("eth0:")]
        self.sent.append(int(line.split(":")[1].split()[8]))
        self.began.append(time.perf_counter())


def train(folder: Path, model: Path, steps: int) -> dict[str, Any]:
    """Train on this rank; what was measured, and what a prediction needs."""
    measured = Steps()
    trainer = toy_trainer(
        folder,
        base=model,
        rows=96,
        max_steps=steps + _LEFT_OUT + 1,
        per_device_train_batch_size=3,
        callbacks=[measured],
        logging_steps=1000,
        logging_first_step=False,
        lora_r=8,
    )
    trainer.train()
    placement = trainer.placement
    assert placement is not None
    began = measured.began[_LEFT_OUT:]
    sent = measured.sent[_LEFT_OUT:]
    return {
        "seconds": [after - before for before, after in itertools.pairwise(began)],
        "sent": (sent[-1] - sent[0]) / (len(sent) - 1),
        "traffic": trainer.host_traffic,
        "layout": placement.layout,
    }


def measure(layout: str, link: int | None, both: list[Host], model: Path, steps: int) -> dict:
    """The first rank's account of a run on two hosts."""
    if link is not None:
        for host in both:
            host.limit(megabits=link)
    with tempfile.TemporaryDirectory() as folder:
        return dict(
            run_ranks(
                train, Path(folder), model, steps,
                world_size=RANKS, environment=LAYOUTS[layout], hosts=both,
            )[0]
        )  # fmt: skip


def everything(links: Sequence[int], *, steps: int) -> list[Measured]:
    """Every layout without a limit, and over every network."""
    found = []
    with tempfile.TemporaryDirectory() as model:
        write_model(Path(model))
        for layout in LAYOUTS:
            found += over_links(layout, links, Path(model), steps=steps)
    return found


def over_links(layout: str, links: Sequence[int], model: Path, *, steps: int) -> list[Measured]:
    """A layout without a limit, which comes first, and over every network."""
    found = []
    alone = 0.0
    with hosts(2) as both:
        for link in (None, *links):
            run = measure(layout, link, both, model, steps)
            seconds = statistics.median(run["seconds"])
            traffic = run["traffic"]
            predicted = None
            if link is None:
                alone = seconds
            else:
                speed = link / 1000 * GIGABIT
                weights = seconds_of_weights(traffic, run["layout"], link=speed)
                gradients = seconds_of_gradients(traffic, run["layout"], link=speed)
                predicted = max(alone, weights) + gradients
            one = Measured(layout, link, seconds, run["sent"], traffic.total, predicted)
            print(line(one), flush=True)
            found.append(one)
    return found


def line(one: Measured) -> str:
    """Of the table."""
    link = "no limit" if one.megabits is None else f"{one.megabits:,}"
    predicted = "" if one.predicted_seconds is None else f"{one.predicted_seconds:.3f}"
    sent = f"{one.sent_bytes / 1e6:.2f} | {one.predicted_bytes / 1e6:.2f}"
    return f"| {one.layout} | {link} | {sent} | {one.seconds:.3f} | {predicted} |"


def main() -> None:
    """Measure, and print a table for docs/many-machines.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabits", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--steps", type=int, default=10, help="measured, of each run")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    given = parser.parse_args()
    if (reason := why_no_hosts()) is not None:
        sys.exit(f"No hosts can be made of network namespaces here: {reason}.")
    print("| layout | Mbit/s | MB sent a step | predicted | s a step | predicted |")
    print("| --- | --- | --- | --- | --- | --- |")
    before = os.getloadavg()[0]
    found = everything(given.megabits, steps=given.steps)
    load = [round(one, 1) for one in (before, os.getloadavg()[0])]
    print(f"load before and after, of {os.cpu_count()} cores: {load[0]}, {load[1]}")
    if given.json:
        results = {"load": load, "cores": os.cpu_count(), "measured": [asdict(m) for m in found]}
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
