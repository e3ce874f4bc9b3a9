"""Adapters that share a pass over the base: trained together, then saved and scored one by one."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Mapping
from copy import copy
from functools import partial
from pathlib import Path

from peft import LoraConfig

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.streaming import OpenBase
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.ranks import on_first_rank
from lora_fsdp.sweeps.earlier import STAGE_FILE, STOPPED_FILE, TOGETHER
from lora_fsdp.sweeps.halving import Stage, step_at
from lora_fsdp.sweeps.member_run import MemberRun
from lora_fsdp.sweeps.once import Once
from lora_fsdp.training.step.objectives.choice import objective_of
from lora_fsdp.training.together.loop import AdaptersTogether
from lora_fsdp.training.together.members import MemberPlan


def train_over_one_pass(
    once: Once,
    members: Mapping[str, tuple[FineTuningArguments, LoraConfig]],
    stage: Stage | None = None,
) -> dict[str, float | None]:
    """Train adapters that share a pass, save and score each. A collective call.

    Args:
        once: what all adapters of the run have in common.
        members: arguments and settings of each adapter, by its name.
        stage: up to where; `None` = to the end.

    Returns:
        of a stage, each adapter's score on its validation rows, `None` if it has diverged.
    """
    ends = stage is None or stage.share >= 1
    place = _place(once.root, members, 0 if stage is None else stage.number)
    base, together = _attached(once, place, members)
    runs = [MemberRun(once, together, member) for member in together.members]
    for run in runs:
        run.record()
        run.go_on_from_stage()
        if stage is not None:
            run.member.until = step_at(stage.share, run.member.last)
    began = time.perf_counter()
    together.train(resume=bool(once.training.resume_from_checkpoint))
    seconds = time.perf_counter() - began
    scores: dict[str, float | None] = {}
    for run in runs:
        if (why := run.member.stopped) is not None:
            scores[run.asked.name] = None
            on_first_rank(partial(note_stopped, run.folder, why))
        elif ends:
            run.save_and_score(seconds)
        else:
            scores[run.asked.name] = run.leave_stage()
    on_first_rank(lambda: shutil.rmtree(place, ignore_errors=True))
    once.base.give_back(together, base)
    return scores


def _place(root: Path, names: Iterable[str], stage: int) -> Path:
    """For the common checkpoints of these adapters: others would not fit them."""
    digest = hashlib.sha256("\n".join([str(stage), *names]).encode()).hexdigest()
    return root / f"{TOGETHER}-{digest[:12]}"


def _attached(
    once: Once, place: Path, members: Mapping[str, tuple[FineTuningArguments, LoraConfig]]
) -> tuple[OpenBase, AdaptersTogether]:
    """The base, and the adapters over it; `place` is for their common checkpoints."""
    plans = [
        MemberPlan(name, args, config, once.tokens(once.rows.of(once.of(name).fold)[0]))
        for name, (args, config) in members.items()
    ]
    common = copy(once.training)
    common.output_dir = str(place)
    base = once.base.take(plans[0].config)
    together = AdaptersTogether(
        base,
        common,
        plans=plans,
        encoder=once.encoder,
        held_out=once.tokens(once.data.held_out),
        objective=objective_of(once.data.task),
    )
    return base, together


def note_stopped(folder: Path, why: str) -> None:
    """Write that an adapter was stopped before its end; for one rank to call."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAGE_FILE).unlink(missing_ok=True)
    write_json(folder / STOPPED_FILE, {"why": why})
