"""Adapters that share a pass over the base: trained together, then saved and scored one by one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from copy import copy
from functools import partial
from pathlib import Path

from peft import LoraConfig

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.ranks import on_first_rank
from lora_fsdp.sweeps.earlier import STOPPED_FILE, TOGETHER
from lora_fsdp.sweeps.member_run import MemberRun
from lora_fsdp.sweeps.once import Once
from lora_fsdp.training.step.objectives.choice import objective_of
from lora_fsdp.training.together.loop import AdaptersTogether
from lora_fsdp.training.together.members import MemberPlan


def train_over_one_pass(
    once: Once,
    number: int,
    members: Mapping[str, tuple[FineTuningArguments, LoraConfig]],
) -> None:
    """Train adapters that share a pass, save and score each. A collective call.

    Args:
        once: what all adapters of the run have in common.
        number: of the group, from 0.
        members: arguments and settings of each adapter, by its name.
    """
    place = once.root / f"{TOGETHER}-{number + 1}"
    plans = [
        MemberPlan(name, args, config, once.tokens(once.rows.of(once.of(name).fold)[0]))
        for name, (args, config) in members.items()
    ]
    common = copy(once.training)
    common.output_dir, common.step = str(place), "eager"
    base = once.base.take(plans[0].config)
    together = AdaptersTogether(
        base,
        common,
        plans=plans,
        encoder=once.encoder,
        held_out=once.tokens(once.data.held_out),
        objective=objective_of(once.data.task, smoothing=0.0),
    )
    runs = [MemberRun(once, together, member) for member in together.members]
    for run in runs:
        run.record()
    began = time.perf_counter()
    together.train(resume=bool(once.training.resume_from_checkpoint))
    seconds = time.perf_counter() - began
    for run in runs:
        if (why := run.member.stopped) is None:
            run.save_and_score(seconds)
        else:
            on_first_rank(partial(_note_stopped, run.folder, why))
    on_first_rank(lambda: shutil.rmtree(place, ignore_errors=True))
    once.base.give_back(together, base)


def _note_stopped(folder: Path, why: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STOPPED_FILE, {"why": why})
