"""All that is to be known on four or eight GPUs of one host, in one call of under ten minutes.

    python -m benchmarks.many_gpus --gpus 4
    python -m benchmarks.many_gpus --gpus 8 --arms 70b-bf16 70b-4bit --seconds 240
    python -m benchmarks.many_gpus --gpus 4 --rehearse        # tiny shapes, gloo ranks on a CPU

Every arm is a process group of its own with a limit of its own; while one runs, the next one
imports. What an arm found is written when it ends (`--output`, a JSON file for each point), so a
later one's failure, or the end of the time, loses nothing. What did not fit is named at the end,
with the command that runs it; results of earlier calls in the same files are kept.

Points: 1 tweets, 8 a GPU and step; 2 one text of 4,083 tokens a GPU; 3 the source article's job
from the command line to the report; 4 a 70B shape, bfloat16 and 4 bits; 5 a 235B-A22B mixture of
experts in 4 bits; 6 the tests for several GPUs, and a run resumed on N, 1 and N / 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.many_gpus_bars import bars_table
from benchmarks.processes import Started
from benchmarks.throughput import ARMS, CONFIGS, RESULTS, environment, table
from benchmarks.workload import Workload

ROOT = Path(__file__).resolve().parents[1]
#: Kept for the table and for writing, at the end.
_MARGIN = 10.0
_TESTS = "tests/gpu/test_two_gpus.py"


@dataclass(frozen=True)
class Measurement:
    """An arm of the call.

    Attributes:
        name: of this arm.
        point: what it belongs to.
        least: seconds without which it is not started.
        limit: seconds after which it is ended.
        arm: of `benchmarks.throughput`, with `work`; without one, `command` is run.
        work: what that arm does.
        alone: it has one GPU.
        hybrid: two copies of the base, each sharded over half of the GPUs.
        command: its words after the interpreter; `{output}` and `{folder}` are filled in.
    """

    name: str
    point: str
    least: float
    limit: float
    arm: str | None = None
    work: Workload | None = None
    alone: bool = False
    hybrid: bool = False
    command: Sequence[str] = field(default_factory=tuple)


def measurements(gpus: int, *, rehearse: bool) -> list[Measurement]:
    """Everything, in order of worth."""
    tweets = Workload(scored=0, steps=40)
    long = Workload(scored=0, steps=16, rows="long", examples=1)
    large = replace(long, model="llama-70b", streamed=True, steps=14)
    experts = replace(large, model="qwen3-235b-a22b", in_4bit=True, saved=True)
    if rehearse:
        tiny = {"model": "tiny", "dtype": "float32", "steps": 4, "long_tokens": 200}
        tweets, long = replace(tweets, **tiny), replace(long, **tiny)
        large, experts = replace(large, **tiny), replace(experts, **tiny | {"model": "tiny-moe"})

    def arm(name: str, point: str, least: float, limit: float, **more: Any) -> Measurement:
        return Measurement(name, point, least, limit, **more)

    found = [
        arm("tweets-resident", "1-tweets", 25, 70, arm="ours-resident", work=tweets),
        arm("tweets-one-gpu", "1-tweets", 25, 60, arm="ours-auto", work=tweets, alone=True),
        arm("tweets-full-shard", "1-tweets", 30, 80, arm="ours-full-shard-graph", work=tweets),
        arm("tweets-trl-ddp", "1-tweets", 25, 70, arm="trl-ddp", work=tweets),
        arm("tweets-trl-fsdp2", "1-tweets", 30, 80, arm="trl-fsdp2", work=tweets),
        arm("long-resident", "2-long", 25, 70, arm="ours-resident", work=long),
        arm("long-full-shard", "2-long", 30, 80, arm="ours-full-shard-graph", work=long),
        arm("resume", "6-tests", 35, 110, command=_resume(gpus)),
        arm("70b-bf16", "4-70b", 40, 110, arm="ours-full-shard-graph", work=large),
        arm("70b-4bit", "4-70b", 40, 110, arm="ours-full-shard-graph",
            work=replace(large, in_4bit=True)),
        arm("tests", "6-tests", 40, 150, command=_tests(gpus)),
        arm("job", "3-job", 50, 150, command=_job(gpus, rehearse=rehearse)),
        arm("tweets-hybrid", "1-tweets", 30, 80, arm="ours-full-shard-graph", work=tweets,
            hybrid=True),
        arm("long-hybrid", "2-long", 30, 80, arm="ours-full-shard-graph", work=long, hybrid=True),
        arm("long-trl-ddp", "2-long", 25, 70, arm="trl-ddp", work=long),
        arm("long-trl-fsdp2", "2-long", 30, 80, arm="trl-fsdp2", work=long),
        arm("experts-4bit", "5-experts", 50, 150, arm="ours-full-shard-graph", work=experts),
    ]  # fmt: skip
    if gpus < 4:  # half of two is one: nothing is sharded
        found = [one for one in found if not one.hybrid]
    if rehearse:
        found = [replace(one, least=5.0, limit=240.0) for one in found]
    return found


def _resume(gpus: int) -> list[str]:
    return ["-m", "benchmarks.resumed", "--ranks", str(gpus), "--output", "{output}"]


def _tests(gpus: int) -> list[str]:
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "-k", f"{gpus}-ranks", _TESTS]
    return [*words, "--junit-xml", "{folder}/tests.xml"]


def _job(gpus: int, *, rehearse: bool) -> list[str]:
    """The article's, as a person starts it; the model's folder is made before, outside its time."""
    words = ["-m", "benchmarks.whole_job", "--gpus", str(gpus), "--output", "{output}"]
    return [*words, "--folder", "{folder}", *(["--rehearse"] if rehearse else [])]


class Call:
    """One call: what is to be run, where its files are, and until when.

    Args:
        asked: the command line.
        scratch: a folder for what is not kept.
    """

    def __init__(self, asked: argparse.Namespace, scratch: Path) -> None:
        self.asked, self.scratch = asked, scratch
        self.until = time.monotonic() + asked.seconds - _MARGIN
        self.environment = environment()
        self.left_out: dict[str, str] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def run(self, todo: Sequence[Measurement]) -> None:
        """Run one after the other; the next one gets ready meanwhile."""
        ready: tuple[Measurement, Started] | None = None
        try:
            for index, one in enumerate(todo):
                if self.left < one.least:
                    self.left_out[one.name] = f"{max(self.left, 0):.0f} s were left of its least "
                    self.left_out[one.name] += f"{one.least:.0f}"
                    continue
                if ready is None or ready[0] is not one:
                    if ready is not None:
                        ready[1].end()
                    ready = one, self.start(one)
                started, began = ready[1], time.monotonic()
                ready = None
                self.go(one).touch()
                following = next(iter(todo[index + 1 :]), None)
                if following is not None and following.arm and self.left > 2 * following.least:
                    ready = following, self.start(following)
                failed = started.wait(min(one.limit, self.left))
                self.keep(one, failed, seconds=time.monotonic() - began)
        finally:
            if ready is not None:
                ready[1].end()

    def go(self, one: Measurement) -> Path:
        """The file for which an arm waits when it is ready."""
        return self.scratch / f"{one.name}.go"

    def words(self, one: Measurement) -> list[str]:
        """The command, after the interpreter."""
        output, folder = self.scratch / f"{one.name}.json", self.scratch / one.name
        folder.mkdir(exist_ok=True)
        if one.arm is None or one.work is None:
            return [word.format(output=output, folder=folder) for word in one.command]
        arm = ARMS[one.arm]
        options = dict(arm.options)
        if self.asked.rehearse and "step" in options:
            del options["step"]  # CUDA graphs
        asked = {
            "kind": arm.kind,
            "work": asdict(one.work),
            "options": options,
            "output": str(output),
            "folder": str(folder),
            "go": str(self.go(one)),
        }
        if one.alone:
            return ["-m", "benchmarks.arms", json.dumps(asked)]
        words = ["-m", "accelerate.commands.launch", "--config_file", str(self.yaml(one))]
        words += ["--num_processes", str(self.asked.gpus), *arm.yaml_options]
        return [*words, "-m", "benchmarks.arms", json.dumps(asked)]

    def yaml(self, one: Measurement) -> Path:
        """The accelerate YAML of an arm."""
        name = "fsdp2_cpu.yaml" if self.asked.rehearse else ARMS[str(one.arm)].yaml
        shipped = CONFIGS / str(name)
        if not one.hybrid:
            return shipped
        contents = yaml.safe_load(shipped.read_text())
        sizes = {"dp_replicate": 2, "dp_shard": self.asked.gpus // 2, "tp": 1, "cp": 1, "sp": 1}
        contents["parallelism_config"] = {
            f"parallelism_config_{name}_size": size for name, size in sizes.items()
        }
        file = self.scratch / "hybrid.yaml"
        file.write_text(yaml.safe_dump(contents))
        return file

    def start(self, one: Measurement) -> Started:
        """Start an arm's processes; those of `benchmarks.arms` wait for `go`."""
        variables = {**os.environ, "ARM_STARTED": str(time.time()), "PYTHONUNBUFFERED": "1"}
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        if one.alone:
            variables["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")[:1]
        log = self.scratch / f"{one.name}.log"
        return Started([sys.executable, *self.words(one)], log=log, environment=variables)

    def keep(self, one: Measurement, failed: str | None, *, seconds: float) -> None:
        """Write what an arm found, or why it did not."""
        output = self.scratch / f"{one.name}.json"
        result: dict[str, Any] = {}
        if output.exists():
            result = json.loads(output.read_text())
        if one.name == "tests":
            result |= _counted(self.scratch / one.name / "tests.xml")
        if failed or not result:
            result["failed"] = failed or "no result"
            self.keep_log(one)
        result["arm_seconds"] = round(seconds, 1)
        entry = {
            "command": self.again([one.name]),
            "gpus": 1 if one.alone else self.asked.gpus,
            "workload": asdict(one.work) if one.work else None,
            "environment": self.environment,
            "result": result,
        }
        file = self.file(one.point)
        stored = read_results(file)
        stored[one.name] = entry
        whole = file.with_suffix(".part")
        whole.write_text(json.dumps(stored, indent=1) + "\n")
        whole.replace(file)
        shown = result.get("failed") or "done"
        print(f"{one.name}: {shown} ({seconds:.0f} s; {max(self.left, 0):.0f} s left)", flush=True)

    def again(self, arms: Sequence[str]) -> str:
        """The command that runs these arms."""
        words = ["python", "-m", "benchmarks.many_gpus", "--gpus", str(self.asked.gpus)]
        return shlex.join([*words, *["--rehearse"] * self.asked.rehearse, "--arms", *arms])

    def keep_log(self, one: Measurement) -> None:
        """The end of what a failed arm printed, beside the results."""
        log = (self.scratch / f"{one.name}.log").read_text(errors="replace")
        (self.asked.output / f"{self.stem}-{one.name}.log").write_text(log[-20_000:])

    @property
    def stem(self) -> str:
        """What the results' files are called by: the device and how many."""
        device = (str(self.environment["device"]).split() or ["cpu"])[-1].lower()
        return f"{'rehearsal' if self.asked.rehearse else device}-x{self.asked.gpus}"

    def file(self, point: str) -> Path:
        """A point's results."""
        return Path(self.asked.output) / f"{self.stem}-{point}.json"


def read_results(file: Path) -> dict[str, Any]:
    """A point's results so far, by arm."""
    return json.loads(file.read_text()) if file.exists() else {}


def _counted(file: Path) -> dict[str, Any]:
    """What pytest's JUnit file says, if it was written."""
    import xml.etree.ElementTree as ElementTree

    if not file.exists():
        return {}
    suite = ElementTree.parse(file).getroot().find("testsuite")
    if suite is None:
        return {}
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    reasons = {one.get("message", "") for one in suite.iter("skipped")}
    failed = [
        case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None
    ]
    return counts | {"reasons_for_skipping": sorted(reasons), "failed_tests": failed}


def speed_table(call: Call, point: str) -> str:
    """The arms of a point in the words of `benchmarks.throughput`."""
    stored = read_results(call.file(point))
    arms = {n: one["result"] for n, one in stored.items() if "step_ms" in one["result"]}
    if not arms:
        return ""
    work = next(stored[name]["workload"] for name in arms)
    for arm in arms.values():
        arm["gradients_agree"] = False  # compared by benchmarks.throughput, not here
    report = {"workload": work, "environment": call.environment, "processes": call.asked.gpus}
    return table({**report, "ceiling_tflops": {}, "arms": arms})


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--gpus", type=int, default=4, choices=(2, 4, 8))
    made.add_argument("--arms", nargs="+", metavar="ARM", help="these alone, in this order")
    made.add_argument("--seconds", type=float, default=570.0, help="that the call may take")
    made.add_argument("--output", type=Path, default=RESULTS, help="the results' folder")
    made.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU, over gloo")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the arms, print the tables; 1 if an arm failed or was left out."""
    made = parser()
    asked = made.parse_args(arguments)
    every = {one.name: one for one in measurements(asked.gpus, rehearse=asked.rehearse)}
    if unknown := [name for name in asked.arms or [] if name not in every]:
        made.error(f"--arms {unknown[0]}: choose from {', '.join(every)}.")
    import torch

    if not asked.rehearse and torch.cuda.device_count() < asked.gpus:
        made.error(
            f"--gpus {asked.gpus}, but {torch.cuda.device_count()} CUDA GPUs are here; --rehearse "
            "runs tiny shapes on the CPU."
        )
    todo = [every[name] for name in asked.arms or every]
    asked.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        call = Call(asked, Path(scratch))
        call.run(todo)
    for point in ("1-tweets", "2-long", "4-70b", "5-experts"):
        if text := speed_table(call, point):
            print(f"\n{text}")
    results = {}
    for point in dict.fromkeys(one.point for one in every.values()):
        results |= read_results(call.file(point))
    print(f"\n{bars_table(results, gpus=asked.gpus)}")
    for name, reason in call.left_out.items():
        print(f"not run: {name} ({reason})")
    if call.left_out:
        print(f"They run by: {call.again(list(call.left_out))}")
    failed = [one.name for one in todo if "failed" in results.get(one.name, {}).get("result", {})]
    return 1 if failed or call.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
