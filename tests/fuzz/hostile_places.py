"""Checkpoints with markers of other shapes, output folders with things of the user's, bases whose
files disagree.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lora_fsdp.training.saving.atomic_folders import MARKER, PARTIAL, REPLACED, atomic_folder

FACTS = {"launch": {"rank": 0, "world_size": 1}, "must_stay": {}, "may_change": {}}
_VALUES: list[Any] = [
    None,
    True,
    -1,
    10**30,
    0.5,
    "",
    "x",
    [],
    [[]],
    {},
    {"a": {}},
    ["files"],
    "\0",
]
_STEMS = ["checkpoint-4", "checkpoint-x", "notes", "diverged-step-3", "report_figures", "a b", "ü"]


def run_folder(folder: Path) -> Path:
    """A run's folder with two whole checkpoints."""
    for step in (2, 4):
        with atomic_folder(folder / f"checkpoint-{step}", FACTS) as partial:
            (partial / "weights.bin").write_bytes(bytes(range(50)) * step)
            (partial / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def damage_marker(random_: random.Random, checkpoint: Path) -> str:
    """Give the marker of a checkpoint another form, or another content."""
    file = checkpoint / MARKER
    marker = json.loads(file.read_text(encoding="utf-8"))
    way = random_.choice(["value", "key", "whole", "bytes", "cut", "folder", "gone", "nested"])
    if way == "value":
        marker[random_.choice(sorted(marker))] = random_.choice(_VALUES)
    elif way == "key":
        del marker[random_.choice(sorted(marker))]
    elif way == "nested":
        inner = marker["files"][random_.choice(sorted(marker["files"]))]
        inner[random_.choice(sorted(inner))] = random_.choice(_VALUES)
    elif way == "whole":
        marker = random_.choice(_VALUES)
    if way in ("gone", "folder"):
        file.unlink()
        if way == "folder":
            file.mkdir()
    elif way == "bytes":
        file.write_bytes(random_.randbytes(random_.randrange(200)))
    elif way == "cut":
        file.write_bytes(file.read_bytes()[: random_.randrange(1, 60)])
    else:
        file.write_text(json.dumps(marker), encoding="utf-8")
    return way


def users_things(random_: random.Random, folder: Path) -> str:
    """Put files, folders and links of the user's into an output folder; returns what."""
    put = []
    for _ in range(random_.randrange(1, 5)):
        name = random_.choice(_STEMS) + random_.choice(["", PARTIAL, REPLACED, ".bak", ".lock"])
        place = folder / name
        if os.path.lexists(place):
            continue
        kind = random_.choice(["file", "folder", "link", "dangling"])
        if kind == "file":
            place.write_text("mine")
        elif kind == "folder":
            place.mkdir()
            (place / "mine.txt").write_text("mine")
        else:
            place.symlink_to(folder.parent / ("elsewhere" if kind == "link" else "nowhere"))
        put.append(f"{kind} {name}")
    return ", ".join(put)


def listing(folder: Path) -> dict[str, Any]:
    """Everything in a folder, links as links."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def confuse_weights(random_: random.Random, base: Path) -> str:
    """Have the files of a base in several shards disagree."""
    index = base / "model.safetensors.index.json"
    contents = json.loads(index.read_text(encoding="utf-8"))
    names, shards = sorted(contents["weight_map"]), sorted(set(contents["weight_map"].values()))
    way = random_.choice(
        ["stale whole", "missing entry", "other shard", "outside", "missing shard", "nothing",
         "further tensor", "other shape", "index of other form", "no index"]
    )  # fmt: skip
    shard = base / random_.choice(shards)
    if way == "stale whole":
        some = load_file(base / shards[0])
        save_file({name: value + 1 for name, value in some.items()}, base / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
    elif way == "missing entry":
        del contents["weight_map"][random_.choice(names)]
    elif way == "other shard":
        contents["weight_map"][random_.choice(names)] = random_.choice(shards)
    elif way == "outside":
        contents["weight_map"][random_.choice(names)] = random_.choice(
            ["../outside.safetensors", str(base.parent / "outside.safetensors")]
        )
    elif way == "missing shard":
        shard.unlink()
    elif way == "further tensor":
        some = load_file(shard)
        save_file({**some, "further.weight": next(iter(some.values())).clone()}, shard,
                  metadata={"format": "pt"})  # fmt: skip
    elif way == "other shape":
        some = load_file(shard)
        name = random_.choice(sorted(some))
        some[name] = some[name].flatten()[:-1].clone()
        save_file(some, shard, metadata={"format": "pt"})
    elif way == "index of other form":
        contents = random_.choice([[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, "x"])
    if way == "no index":
        index.unlink()
    else:
        index.write_text(json.dumps(contents), encoding="utf-8")
    return way


def copy_base(source: Path, base: Path) -> Path:
    """A base of one's own to damage."""
    shutil.copytree(source, base)
    return base
