"""Kills real runs at random instants, resumes them, and compares what they end with.

    python -m tests.faults.campaign --kills 200 --launched 0.15

A run of one or two processes is killed a few times (one rank, all ranks, the launcher; SIGKILL or
SIGTERM; while it starts, between steps, while it saves), resumed until it is finished, and then
compared to the bit with a run that was never stopped. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import add_option, keep
from lora_fsdp.adapter.folder import ADAPTER_FILE
from lora_fsdp.training.saving.checkpoints import find_damage, list_checkpoints
from lora_fsdp.training.watching.interruption import EXIT_CODE
from tests.faults.attempts import Attempt, ForkedAttempt, LaunchedAttempt, log_of, send
from tests.faults.toy_run import RESULT, VARIANTS

# torchrun gives its ranks 30 s after SIGTERM; DataLoader workers look for their parent every 5 s.
END_SECONDS = 60.0
RUN_SECONDS = 300.0


@dataclass
class Figures:
    """What a campaign counts; `lost` to `leftovers` must be 0."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    lost: int = 0
    wrong_adapters: int = 0
    unequal: int = 0
    failed: int = 0
    leftovers: int = 0
    told: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """All, and the kills by signal and by moment."""
        parts = Counter[str]()
        for kind, count in self.kills.items():
            parts.update(dict.fromkeys(kind.split(", "), count))
        return {**asdict(self), "all_kills": sum(self.kills.values()), "kills_by": parts}

    def __str__(self) -> str:
        lines = [f"runs: {self.runs}", f"kills: {sum(self.kills.values())}"]
        lines += [f"  {kind}: {count}" for kind, count in sorted(self.kills.items())]
        lines += [
            f"resumes: {self.resumes}",
            f"losses of a whole checkpoint: {self.lost}",
            f"wrong adapters: {self.wrong_adapters}",
            f"unequal ends: {self.unequal}",
            f"resumes that failed: {self.failed}",
            f"leftover processes: {self.leftovers}",
            f"peers that the launcher had to end: {dict(sorted(self.told.items()))}",
            "exit codes after SIGTERM: " + str(dict(sorted(self.codes.items()))),
        ]
        return "\n".join(lines)


class Campaign:
    """Runs in one scratch folder, with what each must end with."""

    def __init__(self, scratch: Path, *, seed: int) -> None:
        self.scratch = scratch
        self.random = random.Random(seed)
        self.figures = Figures()
        self._references: dict[tuple[str, int], tuple[dict[str, Any], bytes]] = {}

    def one_run(self, *, kills: int, launched: bool, world_size: int, variant: str) -> None:
        """A run killed up to `kills` times, then finished and compared."""
        folder = self.scratch / f"run-{self.figures.runs}"
        self.figures.runs += 1
        kind = LaunchedAttempt if launched else ForkedAttempt
        for _ in range(kills):
            attempt = kind(folder, variant, world_size=world_size)
            if not self._kill(attempt, folder, launched=launched):
                break
            self.figures.resumes += 1
        if not (folder / RESULT).exists():
            attempt = kind(folder, variant, world_size=world_size)
            self.figures.leftovers += len(attempt.wait(RUN_SECONDS))
        self._compare(folder, variant, world_size)

    def _kill(self, attempt: Attempt, folder: Path, *, launched: bool) -> bool:
        """Kill at a random instant; whether the run was not over before."""
        when = self._wait_for_an_instant(attempt, folder, launched=launched)
        before = newest_whole(folder)
        targets, what, number = self._choose(attempt, launched=launched)
        if attempt.exit_code() is not None or not any([send(pid, number) for pid in targets]):
            attempt.wait(END_SECONDS)
            return False
        self.figures.kills[f"{number.name} to {what}, {when}"] += 1
        self.figures.leftovers += len(attempt.wait(END_SECONDS))
        if attempt.told:
            self.figures.told[when] += attempt.told
            shutil.copy(log_of(folder), folder.with_suffix(f".told-{self.figures.resumes}.log"))
        after = newest_whole(folder)
        if after < before:
            self.figures.lost += 1
            self._report(folder, f"lost: whole was {before}, is {after}")
        if number == signal.SIGTERM:
            code = attempt.exit_code()
            self.figures.codes[f"{'launcher' if launched else 'rank'} {code}"] += 1
            if not launched and code == EXIT_CODE and after == 0:
                self.figures.lost += 1
                self._report(folder, "exit code 75 without a checkpoint")
        return not (folder / RESULT).exists()

    def _wait_for_an_instant(self, attempt: Attempt, folder: Path, *, launched: bool) -> str:
        when = self.random.choice(["while starting", "in a step", "while saving", "while saving"])
        until = time.monotonic() + RUN_SECONDS
        if when == "while starting":
            time.sleep(self.random.uniform(0, 8.0 if launched else 1.0))
            return when
        steps_before = log_of(folder).read_text().count("step ") if log_of(folder).exists() else 0
        after_saves = self.random.randint(0, 4)
        seen: set[Path] = set()
        while attempt.exit_code() is None and time.monotonic() < until:
            if when == "while saving":
                seen |= set(folder.glob("*.partial"))
                if len(seen) > after_saves:
                    time.sleep(self.random.uniform(0, 0.05))
                    break
                time.sleep(0.002)
            else:
                steps = log_of(folder).read_text().count("step ") if log_of(folder).exists() else 0
                if steps > steps_before + after_saves:
                    time.sleep(self.random.uniform(0, 0.3))
                    break
                time.sleep(0.02)
        return when

    def _choose(self, attempt: Attempt, *, launched: bool) -> tuple[list[int], str, signal.Signals]:
        number = signal.SIGTERM if self.random.random() < 0.3 else signal.SIGKILL
        ranks, launcher = attempt.ranks(), attempt.launcher()
        if launcher is not None and (not ranks or self.random.random() < 0.6):
            return [launcher], "the launcher", number
        if number == signal.SIGKILL and self.random.random() < 0.4:
            return ranks, "all ranks", number
        return ([self.random.choice(ranks)] if ranks else []), "one rank", number

    def _compare(self, folder: Path, variant: str, world_size: int) -> None:
        if not (folder / RESULT).exists():
            self.figures.failed += 1
            self._report(folder, "did not finish")
            return
        expected, adapter = self._reference(variant, world_size)
        result = json.loads((folder / RESULT).read_text())
        if (folder / ADAPTER_FILE).read_bytes() != adapter or find_damage(folder):
            self.figures.wrong_adapters += 1
            self._report(folder, "wrong adapter")
        elif differing := [name for name in expected if expected[name] != result[name]]:
            self.figures.unequal += 1
            self._report(folder, f"unequal: {differing}")
        else:
            shutil.rmtree(folder)
            log_of(folder).unlink()

    def _reference(self, variant: str, world_size: int) -> tuple[dict[str, Any], bytes]:
        """What an uninterrupted run ends with."""
        key = (variant, world_size)
        if key not in self._references:
            folder = self.scratch / f"reference-{variant}-{world_size}"
            left = ForkedAttempt(folder, variant, world_size=world_size).wait(RUN_SECONDS)
            if left or not (folder / RESULT).exists():
                raise RuntimeError(f"The uninterrupted run failed: see {log_of(folder)}")
            result = json.loads((folder / RESULT).read_text())
            self._references[key] = result, (folder / ADAPTER_FILE).read_bytes()
        return self._references[key]

    def _report(self, folder: Path, problem: str) -> None:
        print(f"!! {folder.name}: {problem} (see {log_of(folder)})", flush=True)


def newest_whole(folder: Path) -> int:
    """Step of the newest whole checkpoint; 0 = there is none."""
    for checkpoint in list_checkpoints(folder):
        # One that retention removes at this very moment is no loss: there is a newer one.
        if find_damage(checkpoint) is None:
            return int(checkpoint.name.rpartition("-")[2])
    return 0


def main() -> None:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--launched", type=float, default=0.15, help="share of accelerate launch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120, help="stop after so long")
    add_option(parser)
    arguments = parser.parse_args()
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(scratch, seed=arguments.seed)
    figures = campaign.figures
    while sum(figures.kills.values()) < arguments.kills:
        if time.monotonic() - started > 60 * arguments.minutes:
            break
        campaign.one_run(
            kills=campaign.random.randint(2, 5),
            launched=campaign.random.random() < arguments.launched,
            world_size=campaign.random.choice([1, 2]),
            variant=campaign.random.choice(list(VARIANTS)),
        )
        print(f"[{time.monotonic() - started:.0f} s] {figures}\n", flush=True)
    seconds = round(time.monotonic() - started)
    print(f"{figures}\nseconds: {seconds}")
    keep(arguments.write, {**figures.to_json(), "seconds": seconds})
    bad = figures.lost + figures.wrong_adapters + figures.unequal + figures.failed
    sys.exit(1 if bad + figures.leftovers else 0)


if __name__ == "__main__":
    main()
