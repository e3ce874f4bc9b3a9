"""What was asked of four and eight GPUs, beside what `benchmarks.many_gpus` found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Published for LoRA of a 70B model in bfloat16 on each of eight H100: tokens a second, TFLOP/s.
YARDSTICK_TOKENS, YARDSTICK_TFLOPS = 1092, 316


@dataclass(frozen=True)
class Bar:
    """A figure and what it is to be.

    Attributes:
        what: is measured.
        measured: as it is shown.
        bar: as it is shown.
        met: whether it is; `None` where there is no bar.
    """

    what: str
    measured: str
    bar: str
    met: bool | None


def bars(results: Mapping[str, Any], *, gpus: int) -> Iterator[Bar]:
    """Of all arms that have a result.

    Args:
        results: what `benchmarks.many_gpus` wrote, by arm.
        gpus: how many there were.
    """
    found = {n: one["result"] for n, one in results.items() if "failed" not in one["result"]}
    yield from _speeds(found, gpus)
    for name, result in found.items():
        if "predicted" in result:
            yield from _as_planned(name, result, steps=results[name]["workload"]["steps"])
    yield from _large(found, gpus)
    yield from _job(found)
    yield from _tests(found, gpus)


def _speeds(found: Mapping[str, Any], gpus: int) -> Iterator[Bar]:
    if {"tweets-resident", "tweets-one-gpu"} <= found.keys():
        alone = gpus * found["tweets-one-gpu"]["examples_per_second"]
        share = found["tweets-resident"]["examples_per_second"] / alone
        what = f"tweets, all resident, of {gpus} x one GPU"
        yield Bar(what, f"{share:.1%}", "at least 95 %", share >= 0.95)
    for rows in ("tweets", "long"):
        ours = found.get(f"{rows}-resident")
        for peer in ("trl-ddp", "trl-fsdp2"):
            other = found.get(f"{rows}-{peer}")
            if ours and other:
                times = ours["examples_per_second"] / other["examples_per_second"]
                yield Bar(f"{rows}, all resident, beside {peer}", f"{times:.1f} x", "", None)
        for layout in ("full-shard", "hybrid"):
            sharded = found.get(f"{rows}-{layout}")
            if ours and sharded:
                times = sharded["step_ms"] / ours["step_ms"]
                is_bound = rows == "long" and layout == "full-shard"
                yield Bar(
                    f"{rows}, {layout}, step beside all resident",
                    f"{times:.3f} x",
                    "at most 1.05 x" if is_bound else "",
                    times <= 1.05 if is_bound else None,
                )


def _as_planned(name: str, result: Mapping[str, Any], *, steps: int) -> Iterator[Bar]:
    plan = result["predicted"]
    if result.get("peak_gb"):
        error = plan["peak_memory_gb"] / result["peak_gb"] - 1
        shown = f"{result['peak_gb']:.2f} GB, {error:+.1%} predicted"
        yield Bar(f"{name}, peak memory", shown, "within 3 %", abs(error) <= 0.03)
    if "training_seconds" in plan:
        error = 1e3 * plan["training_seconds"] / steps / result["step_ms"] - 1
        shown = f"{result['step_ms']:.1f} ms, {error:+.1%} predicted"
        yield Bar(f"{name}, step", shown, "within 15 %", abs(error) <= 0.15)


def _large(found: Mapping[str, Any], gpus: int) -> Iterator[Bar]:
    for name in ("70b-bf16", "70b-4bit"):
        if name in found:
            each = found[name]["tokens_per_second"] / gpus
            tokens = found[name]["computed_tokens_per_step"] / gpus
            rate = 4 * found[name]["parameters"] * tokens / found[name]["step_ms"] / 1e9
            shown = f"{each:,.0f} tokens/s, {rate:.0f} TFLOP/s a GPU"
            yardstick = f"published: {YARDSTICK_TOKENS:,} and {YARDSTICK_TFLOPS}"
            yield Bar(name, shown, yardstick, None)
    if (experts := found.get("experts-4bit")) is not None:
        learnt = experts["last_loss"] < experts["first_loss"]
        losses = f"{experts['first_loss']:.3f} to {experts['last_loss']:.3f}"
        shown = f"loss {losses}, {experts['saved_tensors']} tensors saved"
        yield Bar("experts-4bit trains and saves", shown, "loss falls, adapter read back",
                  learnt and experts["saved_tensors"] > 0)  # fmt: skip


def _job(found: Mapping[str, Any]) -> Iterator[Bar]:
    if (job := found.get("job")) is None:
        return
    parts = job.get("seconds_by_part") or {}
    where = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    yield Bar("the article's job, on the wall", f"{job['wall_seconds']:.1f} s", "", None)
    if where:
        yield Bar("where its time went, seconds", where, "", None)
    if planned := job.get("plan", {}).get("training_seconds"):
        error = planned / job["training_seconds"] - 1
        shown = f"{job['training_seconds']:.1f} s, {error:+.1%} predicted"
        yield Bar("its training", shown, "within 15 %", abs(error) <= 0.15)


def _tests(found: Mapping[str, Any], gpus: int) -> Iterator[Bar]:
    if (tests := found.get("tests")) is not None:
        ran = tests["tests"] - tests["skipped"]
        wrong = tests["failures"] + tests["errors"]
        shown = f"{ran - wrong} passed, {wrong} failed, {tests['skipped']} skipped"
        yield Bar(f"tests on {gpus} GPUs", shown, "all that are run pass", ran > 0 and not wrong)
    if (resume := found.get("resume")) is not None:
        numbers = " - ".join(map(str, resume["ranks"]))
        error = resume["loss_difference"]
        yield Bar(
            f"resumed on {numbers} ranks, losses", f"{error:.1e}", "within 1e-4", error < 1e-4
        )


def bars_table(results: Mapping[str, Any], *, gpus: int) -> str:
    """As Markdown; arms that failed, with their reason, below."""
    lines = ["| what | measured | bar | met |", "| --- " * 4 + "|"]
    words = {True: "yes", False: "no", None: ""}
    for bar in bars(results, gpus=gpus):
        lines.append(f"| {bar.what} | {bar.measured} | {bar.bar} | {words[bar.met]} |")
    for name, one in results.items():
        if "failed" in one["result"]:
            lines.append(f"\n{name} failed: {one['result']['failed']}")
    return "\n".join(lines)
