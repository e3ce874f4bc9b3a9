"""Hosts die, are cut off and come back at random moments of real runs; then the ends are compared.

    python -m tests.distributed.campaign --kills 100 --seed 1     # as root, on Linux

A run is on two to four hosts made of network namespaces, one rank each, under torchrun's agents; on
a disk that all share, or on one disk a host. While it starts, between steps and while it saves, a
host is killed, loses its cable, or is heard by nobody (a half-open connection); lost hosts come
back and join while the others train, which must make steps with them. The first host holds
torchrun's store: with it all end, and the same command goes on.

A run must finish; what is left must make steps again within `--noticed` seconds; the ledger must
hold every row once an epoch; and losses and adapter must be, to the bit, those of a run without any
mishap whose steps are made on as many ranks, one after the other.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.support.elastic_hosts import NOTICED_SECONDS, ElasticHosts, HungError
from tests.support.elastic_run import Ranks, Sizes, elastic_trainer, result_of
from tests.support.hosts import Host, hosts, why_no_hosts
from tests.support.ranks import run_ranks

SIZES = Sizes(rows=48, epochs=3, examples=12, save_steps=2, stall_seconds=4.0)
STEP_SECONDS = 0.25
WAYS = ("killed", "cut off", "half open", "joins")
MOMENTS = ("between steps", "while starting", "while saving")


@dataclass
class Figures:
    """What a campaign counts; what is in `wrong` must not be.

    Attributes:
        events: what happened to hosts, by kind.
        seconds: until those left made steps again, by kind.
        again: runs that were started anew since all of their hosts had ended.
        wrong: a sentence for each run that did not end as it must.
    """

    runs: int = 0
    hosts: Counter[int] = field(default_factory=Counter)
    disks: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    attempts: int = 0
    again: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def losses(self) -> int:
        """Hosts that were lost."""
        return sum(count for kind, count in self.events.items() if not kind.startswith("joins"))

    def __str__(self) -> str:
        lines = [
            f"runs: {self.runs}, by hosts {dict(sorted(self.hosts.items()))}, "
            f"by disks {dict(sorted(self.disks.items()))}",
            f"hosts lost: {self.losses}, attempts: {self.attempts}",
        ]
        for kind, count in sorted(self.events.items()):
            took = sorted(self.seconds.get(kind, []))
            after = f", steps again after {took[len(took) // 2]:.1f} s (median)" if took else ""
            after += f", {took[-1]:.1f} s (longest)" if took else ""
            lines.append(f"  {kind}: {count}{after}")
        lines.append(f"started anew by the same command: {self.again}")
        lines.append(f"runs that ended otherwise than they must: {len(self.wrong)}")
        return "\n".join([*lines, *(f"  {sentence}" for sentence in self.wrong)])


class Campaign:
    """Runs on the same hosts, one after the other."""

    def __init__(
        self, machines: list[Host], scratch: Path, *, seed: int, noticed: float = NOTICED_SECONDS
    ) -> None:
        self.machines, self.scratch, self.noticed = machines, scratch, noticed
        self.random = random.Random(seed)
        self.figures = Figures()

    def one_run(self, *, losses: int, count: int, apart: bool) -> None:
        """A run on `count` hosts that loses up to so many, finished and compared."""
        figures = self.figures
        folder = self.scratch / f"run-{figures.runs}"
        figures.runs += 1
        figures.hosts[count] += 1
        figures.disks["one a host" if apart else "shared"] += 1
        run = ElasticHosts(self.machines[:count], folder, SIZES, apart=apart, seconds=STEP_SECONDS)
        try:
            for place in range(count):
                run.start(place)
            self._mishaps(run, losses)
            figures.again += run.finish(seconds=4 * self.noticed)
            run.check_ledger()
            self._compare(run)
            shutil.rmtree(folder)
        except AssertionError as error:
            run.ask_for_stacks()
            figures.wrong.append(f"run {figures.runs - 1}: {type(error).__name__}: {error}")
            print(f"!! {figures.wrong[-1]} (see {folder})", flush=True)
        finally:
            for place, machine in enumerate(run.hosts):
                run.kill(place)
                machine.mend()

    def _mishaps(self, run: ElasticHosts, losses: int) -> None:
        began = 0
        while losses > 0 and run.result() is None:
            running = run.running()
            gone = [place for place in range(len(run.hosts)) if place not in running]
            way = self.random.choice(WAYS)
            if gone and (way == "joins" or len(running) == 1):
                began = time.monotonic_ns()
                run.start(self.random.choice(gone))
                self._joined(run, began, ranks=len(running) + 1)
                continue
            if way == "joins":
                way = "killed"
            moment = self.random.choice(MOMENTS)
            if not self._moment(run, moment, began):
                return
            # The first host is lost less often: all end with it.
            place = self.random.choice([one for one in (0, *running, *running) if one in running])
            began = time.monotonic_ns()
            {"killed": run.kill, "cut off": run.cut, "half open": run.mute}[way](place)
            losses -= 1
            named = f"{way} {moment}" + (" (with the store)" if place == 0 else "")
            if place == 0:
                self._all_end(run, named)
                continue
            self._goes_on(run, named, began)
            run.replace(place)

    def _moment(self, run: ElasticHosts, moment: str, began: int) -> bool:
        """Wait for it; whether the run was not over before."""
        if moment == "while starting":
            time.sleep(self.random.uniform(0.0, 3.0))
            return run.result() is None
        wanted = 1 + self.random.randint(0, 3)

        def made() -> bool:
            return len({line["step"] for line in run.lines(after=began)}) >= wanted

        there = run.wait(made, seconds=self.noticed)
        if there and moment == "while saving":
            there = run.wait(run.is_saving, seconds=self.noticed)
        else:
            time.sleep(self.random.uniform(0.0, STEP_SECONDS))
        return there and run.result() is None

    def _goes_on(self, run: ElasticHosts, way: str, began: int) -> None:
        """Wait until steps are made in an attempt that began after the event, or all have ended."""
        self.figures.events[way] += 1
        if run.wait(lambda: run.lines(after=began), seconds=self.noticed):
            took = (time.monotonic_ns() - began) / 1e9
            self.figures.seconds.setdefault(way, []).append(took)

    def _joined(self, run: ElasticHosts, began: int, *, ranks: int) -> None:
        """Wait until the one that has come back takes part in steps; none may end of it."""
        self.figures.events["joins"] += 1

        def made() -> bool:
            return any(line["ranks"] == ranks for line in run.lines(after=began))

        if run.wait(made, seconds=self.noticed):
            took = (time.monotonic_ns() - began) / 1e9
            self.figures.seconds.setdefault("joins", []).append(took)
        elif run.result() is None:
            raise HungError(f"a host came back, and {ranks - 1} others ended")

    def _all_end(self, run: ElasticHosts, way: str) -> None:
        """The store is gone: nobody hangs. Then all are started by the same command."""
        self.figures.events[way] += 1
        others = [place for place in run.running() if place != 0]
        began = time.monotonic()
        while any(place in run.running() for place in others):
            if time.monotonic() > began + self.noticed:
                raise HungError(f"{way}: hosts {run.running()} have not ended")
            if run.result() is not None:
                return
            time.sleep(0.05)
        self.figures.seconds.setdefault(way, []).append(time.monotonic() - began)
        for place in range(len(run.hosts)):
            run.replace(place)
            run.start(place)

    def _compare(self, run: ElasticHosts) -> None:
        result = run.result()
        assert result is not None
        found = json.loads(result.read_text())
        self.figures.attempts += len({line["attempt"] for line in run.lines()})
        calm = without_mishaps(run.folder / "calm", found["ranks"])
        differing = [name for name in calm if calm[name] != found[name]]
        assert not differing, f"{differing} are not those of a run without mishaps on as many ranks"


def without_mishaps(folder: Path, ranks: list[int]) -> dict[str, Any]:
    """What a run ends with whose steps are made on so many ranks, one after the other."""
    assert len(ranks) == SIZES.steps, f"{len(ranks)} steps instead of {SIZES.steps}"
    end = 0
    for count, steps in groupby(ranks):
        end += len(list(steps))
        result = run_ranks(stretch, folder, end, world_size=count)[0]
    return dict(result)


class StopAfter(TrainerCallback):
    """Stops after a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


def stretch(folder: Path, end: int) -> dict[str, Any]:
    """Go on to a step, on this rank."""
    trainer = elastic_trainer(
        str(folder), SIZES, callbacks=[Ranks(), StopAfter(end)], save_steps=1000, stall_seconds=60.0
    )
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return result_of(trainer)


def campaign(
    *, kills: int, seed: int, minutes: float, most_hosts: int = 4, noticed: float = NOTICED_SECONDS
) -> Figures:
    """Lose so many hosts."""
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="many-machines-"))
    with hosts(most_hosts) as machines:
        these = Campaign(machines, scratch, seed=seed, noticed=noticed)
        while these.figures.losses < kills and time.monotonic() - began < 60 * minutes:
            these.one_run(
                losses=min(these.random.randint(3, 6), kills - these.figures.losses),
                count=these.random.randint(2, most_hosts),
                apart=these.random.random() < 0.4,
            )
            spent = time.monotonic() - began
            print(f"[{spent:.0f} s] {these.figures}\n", flush=True)
    if not these.figures.wrong:
        shutil.rmtree(scratch)
    return these.figures


def main() -> None:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="hosts to lose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--hosts", type=int, default=4, help="the most of a run")
    parser.add_argument(
        "--noticed",
        type=float,
        default=NOTICED_SECONDS,
        help="seconds until what is left must make steps again; more where others use the machine",
    )
    given = parser.parse_args()
    if (reason := why_no_hosts()) is not None:
        sys.exit(f"No hosts can be made of network namespaces here: {reason}.")
    began = time.monotonic()
    figures = campaign(
        kills=given.kills,
        seed=given.seed,
        minutes=given.minutes,
        most_hosts=given.hosts,
        noticed=given.noticed,
    )
    print(f"{figures}\nseconds: {time.monotonic() - began:.0f}")
    sys.exit(1 if figures.wrong else 0)


if __name__ == "__main__":
    main()
