"""The campaign against hostile input: every input ends in a result or in one of our named errors.

Run: python -m tests.fuzz.campaign --inputs 700 --seed 1
One input again: python -m tests.fuzz.campaign --only folders --seed 1234 --inputs 1
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import transformers

from benchmarks.record import add_option, keep

SECONDS_FOR_ONE = 30
FAILED = "FAILED"


class TookTooLong(BaseException):
    """An input that hangs; no Exception, so that nothing of the library can catch it."""


@dataclass(frozen=True)
class Outcome:
    """How one input ended: "result", the name of our error, or "FAILED"."""

    kind: str
    seed: int
    what: str
    ended: str
    detail: str = ""
    seconds: float = 0.0


class Campaign:
    """Runs hostile inputs against a real tokenizer, base and adapter in a folder of its own."""

    def __init__(self, home: Path) -> None:
        from tests.fuzz.good_folders import make_good_folders

        self.home = home
        self.good = home / "good"
        make_good_folders(self.good)

    def run(self, kind: str, seed: int) -> Outcome:
        """One input of a kind."""
        random_ = random.Random(f"{kind} {seed}")
        work = self.home / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        started = time.perf_counter()
        what, ended, detail = "", FAILED, ""
        from lora_fsdp.errors import LoraFsdpError

        try:
            with time_limit(SECONDS_FOR_ONE), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                what = KINDS[kind](self, random_, work)
            ended = "result"
        except LoraFsdpError as error:
            ended, detail = type(error).__name__, str(error)
            if len(detail) > 4000 or not detail.strip():
                ended, detail = FAILED, f"message of {len(detail)} characters"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            detail = "".join(traceback.format_exception(error)[-12:])
        if left := [p.name for p in work.rglob("*") if p.name.endswith(".tmp")]:
            ended, detail = FAILED, f"left behind: {left}"
        if (work / "exploded").exists() or Path("exploded").exists():
            ended, detail = FAILED, "a pickle was loaded"
        return Outcome(kind, seed, what, ended, detail, time.perf_counter() - started)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TookTooLong` in what takes longer."""

    def stop(*_: Any) -> None:
        raise TookTooLong(f"longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# ---- kinds of input -----------------------------------------------------------------------------


def _tables(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """Read, bound, encoded and written out again."""
    import pandas as pd

    from lora_fsdp.data.encoding import Encoder
    from lora_fsdp.data.tables import read_table
    from lora_fsdp.evaluation.outputs import PredictionRow, format_predictions_table, write_json
    from tests.fuzz.hostile_tables import hostile_table
    from tests.support.tiny import ToyTask, tiny_tokenizer

    file, encoding = hostile_table(random_, work)
    table = read_table(file, encoding=encoding)
    task = ToyTask(labels=None)
    table, _ = task.drop_bad_rows(table)
    bound = task.bind(table)
    examples = bound.examples(table)
    Encoder(tiny_tokenizer(), task=bound, max_length=200).encode(examples)
    rows = [PredictionRow(e.row, e.prompt.text, e.target, None, None, 0.5) for e in examples]
    format_predictions_table(rows)
    write_json(work / "rows.json", [e.prompt.text for e in examples])
    written = pd.DataFrame({"text": [e.prompt.text for e in examples]})
    written.to_csv(work / "predictions.csv", index=False, lineterminator="\n")
    return file.suffix


def _texts(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """Control tokens spelled in a text stay text; the template's own stay."""
    from lora_fsdp.data.encoding import Encoder
    from lora_fsdp.tasks import Example, Prompt
    from tests.data.test_encoding import chat_tokenizer, metaspace_tokenizer
    from tests.fuzz.hostile_settings import hostile_text
    from tests.support.tiny import ToyTask

    chat = random_.random() < 0.5
    tokenizer = chat_tokenizer() if chat or random_.random() < 0.7 else metaspace_tokenizer()
    encoder = Encoder(tokenizer, task=ToyTask(), max_length=700, chat_template=chat)
    prompt = Prompt("Say how it sounds:\nInput: ", hostile_text(random_), "\nOutput:")
    [encoded] = encoder.encode([Example(1, prompt, " positive")])
    specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    found = sum(token in specials for token in encoded.prompt_ids)
    if found != (3 if chat else 0):
        raise AssertionError(f"{found} control tokens in {prompt.text!r}")
    if tokenizer.unk_token is None and tokenizer.decode(encoded.prompt_ids) != encoder.render(
        prompt
    ):
        raise AssertionError(f"another text: {prompt.text!r}")
    return "chat" if chat else "plain"


def _folders(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """A damaged adapter or base, verified, merged, loaded and asked."""
    from lora_fsdp.adapter.merging import merge_adapter
    from lora_fsdp.adapter.verification import verify_adapter_folder
    from lora_fsdp.evaluation.prediction import Predictor
    from tests.fuzz.hostile_folders import damage
    from tests.support.tiny import toy_table

    adapter, base = work / "adapter", work / "base"
    source = random_.choice(["adapter", "plain"])
    shutil.copytree(campaign.good / source, adapter)
    shutil.copytree(campaign.good / "base", base)
    damages = [
        damage(random_, adapter, base, work / "exploded") for _ in range(random_.choice([1, 1, 2]))
    ]
    use = random_.choice(["verify", "merge", "predict"])
    where = None if random_.random() < 0.3 else base
    if use == "verify":
        str(verify_adapter_folder(adapter, base=where))
    elif use == "merge":
        try:
            merge_adapter(adapter, work / "merged", base=where)
        except BaseException:
            if (work / "merged").exists():
                raise AssertionError("a half-written folder") from None
            raise
    else:
        predictor = Predictor.from_adapter(adapter, base=where)
        predictor.columns(predictor.task.examples(toy_table(3)), coverage=0.9)
    return f"{use} {source}: {', '.join(damages)}"


def _resumed(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """A damaged adapter, loaded into a run."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_fsdp.adapter.saved import load_adapter
    from tests.fuzz.hostile_folders import damage
    from tests.support.adapters import adapted

    shutil.copytree(campaign.good / "plain", work / "adapter")
    (work / "base").mkdir()
    (work / "base" / "config.json").write_text("{}")
    what = damage(random_, work / "adapter", work / "base", work / "exploded")
    model = adapted(AutoModelForCausalLM.from_pretrained(campaign.good / "base"))
    load_adapter(model, work / "adapter")
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise AssertionError("NaN was loaded")
    return what


def _recipes(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """A recipe through the scripts' own parser."""
    from lora_fsdp.scripts import parse_arguments
    from tests.fuzz.hostile_settings import hostile_recipe

    (work / "recipe.yaml").write_bytes(hostile_recipe(random_))
    before = dict(os.environ)
    logs = logging.getLogger("lora_fsdp")
    level, hook = logs.level, sys.excepthook
    argv = ["script.py", "--config", str(work / "recipe.yaml"), "--output_dir", str(work / "run")]
    try:
        with mock.patch.object(sys, "argv", argv), mock.patch("atexit.register"):
            parse_arguments(task="sentiment")
    finally:
        logs.setLevel(level)
        sys.excepthook = hook
        changed = {
            key for key in os.environ.keys() | before if os.environ.get(key) != before.get(key)
        }
        os.environ.clear()
        os.environ.update(before)
    if changed - {"ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "TOKENIZERS_PARALLELISM"}:
        raise AssertionError(f"a recipe set environment variables: {changed}")
    return "recipe"


def _launches(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """What an accelerate YAML hands to the ranks."""
    from lora_fsdp.distributed.launch import read_fsdp_settings
    from tests.fuzz.hostile_settings import hostile_launch

    with mock.patch.dict(os.environ, hostile_launch(random_)):
        read_fsdp_settings()
    return "launch"


def _plug_ins(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """Tasks of installed packages: listed, never fatal; made, or refused by name."""
    from lora_fsdp.tasks import get_task, list_tasks
    from tests.fuzz.hostile_settings import hostile_plug_in

    points = hostile_plug_in(random_)
    with mock.patch("lora_fsdp.tasks.registry.entry_points", return_value=points):
        listed = {info.name for info in list_tasks()}
        if not {"sentiment", "classification", *(point.name for point in points)} <= listed:
            raise AssertionError(f"not listed: {points}")
        get_task(random_.choice(sorted(listed)))
    return ", ".join(point.value for point in points)


def _templates(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """A chat template that an adapter brings, in a prompt of one turn and of several."""
    from lora_fsdp.data.encoding import Encoder
    from lora_fsdp.tasks import Example, Prompt
    from tests.data.chat_templates import tokenizer_with
    from tests.fuzz.hostile_templates import hostile_template
    from tests.support.tiny import ToyTask

    tokenizer = tokenizer_with(hostile_template(random_))
    encoder = Encoder(tokenizer, task=ToyTask(), max_length=700, chat_template=True)
    turns = (("user", "a"), ("assistant", "b"))
    for prompt in (Prompt("", "late", ""), Prompt("", "late", "", turns=turns)):
        encoder.encode([Example(1, prompt, " positive")])
    return "template"


def _cells(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """Typed cells of every format are read as they were written."""
    from lora_fsdp.data.tables import read_table
    from lora_fsdp.tasks.cells import cell_text
    from tests.fuzz.hostile_cells import typed_table, written_text

    file, values, what = typed_table(random_, work)
    found = [cell_text(cell) for cell in read_table(file)["answer"]]
    if found != [written_text(value) for value in values]:
        raise AssertionError(f"{what}: {values} became {found}")
    return what


def _labels(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """Labels of every sort are told apart by their tokens, or refused by name."""
    import pandas as pd

    from lora_fsdp.data.encoding import Encoder
    from lora_fsdp.tasks import get_task
    from tests.fuzz.hostile_cells import some_labels
    from tests.support.tiny import tiny_tokenizer

    labels, what = some_labels(random_)
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    table = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="row"), dtype=object)
    task = get_task("classification", {"text_column": "text", "label_column": "label"})
    kept, _ = task.drop_bad_rows(table)
    bound = task.bind(kept)
    encoded = Encoder(tiny_tokenizer(), task=bound, max_length=200).encode(bound.examples(kept))
    for one in encoded:
        candidates = [tuple(ids) for ids in one.candidate_ids]
        if len(set(candidates)) < len(candidates) or one.label is None:
            raise AssertionError(f"{what}: {labels} give {candidates}")
        if tuple(one.target_ids) != candidates[one.label]:
            raise AssertionError(f"{what}: another label's tokens")
    return what


def _markers(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """A checkpoint whose marker says something else: the older whole one is found."""
    from lora_fsdp.training.saving.checkpoints import newest_whole_checkpoint
    from tests.fuzz.hostile_places import damage_marker, run_folder

    folder = run_folder(work / "run")
    what = damage_marker(random_, folder / "checkpoint-4")
    found, skipped = newest_whole_checkpoint(folder)
    if found.name != "checkpoint-2" or len(skipped) != 1:
        # A marker that still says the same is whole.
        if found.name == "checkpoint-4" and not skipped and what == "value":
            return what
        raise AssertionError(f"{what}: {found.name}, {skipped}")
    return what


def _outputs(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """What the user has in an output folder stays, whatever it is called."""
    from lora_fsdp import FineTuningArguments
    from lora_fsdp.claiming import claim_output_folder
    from lora_fsdp.training.saving.run_lock import release_folder
    from tests.fuzz.hostile_places import listing, users_things

    (work / "elsewhere").mkdir()
    folder = work / "run"
    folder.mkdir()
    what = users_things(random_, folder)
    before = listing(work)
    overwrite = random_.random() < 0.5
    try:
        claim_output_folder(
            FineTuningArguments(output_dir=str(folder), overwrite_output_dir=overwrite)
        )
    finally:
        release_folder(folder)
        after = listing(work)
        ours = {name for name in before if _is_of_a_killed_run(name)}
        lost = {name for name in before if before[name] != after.get(name)} - ours
        if lost:
            raise AssertionError(f"{what}: {sorted(lost)} changed")
    return what


def _is_of_a_killed_run(name: str) -> bool:
    """Whether it is in a folder that a killed run leaves, by its name."""
    from lora_fsdp.training.saving.atomic_folders import PARTIAL, REPLACED, is_ours

    top = Path(name).parts[1] if name.startswith("run/") else ""
    return any(top.endswith(end) and is_ours(top.removesuffix(end)) for end in (PARTIAL, REPLACED))


def _weights(campaign: Campaign, random_: random.Random, work: Path) -> str:
    """A base whose files disagree is read as transformers reads it, or refused."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_fsdp import ModelArguments
    from lora_fsdp.base.fingerprints import fingerprint_base
    from lora_fsdp.base.streaming import StoredBase, open_base
    from tests.fuzz.hostile_places import confuse_weights, copy_base

    base = copy_base(campaign.good / "base", work / "base")
    what = confuse_weights(random_, base)
    opened = open_base(ModelArguments(str(base)), device=torch.device("cpu"))
    own = (
        opened.fingerprint() if isinstance(opened, StoredBase) else fingerprint_base(opened.load())
    )
    theirs = fingerprint_base(AutoModelForCausalLM.from_pretrained(base))
    if own != theirs:
        raise AssertionError(f"{what}: other weights than transformers reads")
    return what


KINDS: dict[str, Callable[[Campaign, random.Random, Path], str]] = {
    "tables": _tables,
    "texts": _texts,
    "folders": _folders,
    "resumed": _resumed,
    "recipes": _recipes,
    "launches": _launches,
    "plug-ins": _plug_ins,
    "templates": _templates,
    "cells": _cells,
    "labels": _labels,
    "markers": _markers,
    "outputs": _outputs,
    "weights": _weights,
}
#: How often each is drawn.
WEIGHTS = {"tables": 6, "texts": 3, "folders": 8, "resumed": 2, "recipes": 4, "launches": 2,
           "plug-ins": 1, "templates": 2, "cells": 4, "labels": 3, "markers": 3, "outputs": 3,
           "weights": 2}  # fmt: skip


def run_campaign(home: Path, *, inputs: int, seed: int, only: str | None = None) -> list[Outcome]:
    """So many inputs, spread over the kinds."""
    campaign = Campaign(home)
    cycle = [only] if only else [kind for kind, weight in WEIGHTS.items() for _ in range(weight)]
    return [campaign.run(cycle[n % len(cycle)], seed + n) for n in range(inputs)]


def counts(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """How the inputs of each kind ended, and how all did; the slowest in seconds."""
    found = {}
    for kind in (*KINDS, "all"):
        chosen = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        results = sum(outcome.ended == "result" for outcome in chosen)
        failed = sum(outcome.ended == FAILED for outcome in chosen)
        found[kind] = {
            "inputs": len(chosen),
            "results": results,
            "named_errors": len(chosen) - results - failed,
            "failed": failed,
            "slowest_s": round(max((outcome.seconds for outcome in chosen), default=0.0), 1),
        }
    return found


def summary(outcomes: list[Outcome]) -> str:
    """A table: how the inputs of each kind ended."""
    lines = [f"{'kind':<10} {'inputs':>6} {'result':>7} {'named error':>12} {'failed':>7}  slowest"]
    lines += [
        f"{kind:<10} {found['inputs']:>6} {found['results']:>7} {found['named_errors']:>12} "
        f"{found['failed']:>7}  {found['slowest_s']:.1f} s"
        for kind, found in counts(outcomes).items()
    ]
    names = Counter(o.ended for o in outcomes if o.ended not in ("result", FAILED))
    lines.append(", ".join(f"{name} {count}" for name, count in names.most_common()))
    return "\n".join(lines)


def main() -> int:
    """Run it, print the table and every failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(KINDS))
    add_option(parser)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    home = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        outcomes = run_campaign(
            home, inputs=arguments.inputs, seed=arguments.seed, only=arguments.only
        )
    finally:
        shutil.rmtree(home, ignore_errors=True)
    failed = [outcome for outcome in outcomes if outcome.ended == FAILED]
    for outcome in failed:
        print(f"\n--- {outcome.kind} {outcome.seed} ({outcome.what})\n{outcome.detail}")
    print(f"\n{summary(outcomes)}\n{len(outcomes)} inputs, {len(failed)} failed")
    keep(arguments.write, {"kinds": counts(outcomes)})
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
