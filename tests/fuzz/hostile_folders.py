"""Adapters and bases as an attacker, or a broken copy, would send them."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.marker,))


VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 10**9, 10**30, 1.5, "", "x", "\0", "../../etc", "/etc/passwd",
    [], [1], ["x"], {}, {"x": 1}, {"x": {"y": [None]}}, "(a+)+$", "((\\w+\\.?)+)+X", "a" * 5000,
    ["q_proj"] * 3, float("nan"), "🙂", "IA3", "meta-llama/Llama-2-7b-hf", "https://x/y",
]  # fmt: skip
JSON_TEXTS = ["", "null", "[]", "3", "{", '{"a": ', "[" * 100_000, '{"a":' * 50_000, "\ufeff{}",
              "{}", '{"format": 1}', "1" * 5000, "NaN", '"\\ud800"']  # fmt: skip


def damage(random_: random.Random, adapter: Path, base: Path, marker: Path) -> str:
    """Damage one file of one folder in place; returns what was done."""
    folder = adapter if random_.random() < 0.75 else base
    whole = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    chosen = random_.choice(sorted(path.name for path in whole))
    file = folder / chosen
    actions = [_truncate, _flip, _remove, _swap, _pickle, _link, _directory, _garbage]
    if file.suffix == ".json":
        actions += [_json_value, _json_value, _json_value, _json_key, _json_text, _json_number]
    if file.suffix == ".safetensors":
        actions += [_header, _header, _pickle_beside]
    action = random_.choice(actions)
    try:
        action(random_, file, marker)
    except ValueError:  # the file was damaged before, so that this action cannot read it
        _garbage(random_, file, marker)
    return f"{action.__name__.strip('_')} {folder.name}/{chosen}"


def _truncate(random_: random.Random, file: Path, marker: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: random_.randrange(len(content) + 1)])


def _flip(random_: random.Random, file: Path, marker: Path) -> None:
    content = bytearray(file.read_bytes() or b"x")
    for _ in range(random_.choice([1, 1, 3, 50])):
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    file.write_bytes(bytes(content))


def _remove(random_: random.Random, file: Path, marker: Path) -> None:
    file.unlink()


def _swap(random_: random.Random, file: Path, marker: Path) -> None:
    other = random_.choice(sorted(path for path in file.parent.iterdir() if path.is_file()))
    content = other.read_bytes()
    other.write_bytes(file.read_bytes())
    file.write_bytes(content)


def _pickle(random_: random.Random, file: Path, marker: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(marker)))


def _pickle_beside(random_: random.Random, file: Path, marker: Path) -> None:
    file.unlink()
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        (file.parent / name).write_bytes(pickle.dumps(Bomb(marker)))


def _link(random_: random.Random, file: Path, marker: Path) -> None:
    outside = marker.parent / "outside"
    shutil.copyfile(file, outside)
    file.unlink()
    file.symlink_to(random_.choice([outside, Path("/etc/passwd"), file, Path("nowhere")]))


def _directory(random_: random.Random, file: Path, marker: Path) -> None:
    file.unlink()
    file.mkdir()


def _garbage(random_: random.Random, file: Path, marker: Path) -> None:
    file.write_bytes(random_.randbytes(random_.choice([0, 7, 8, 500])))


def _containers(value: Any) -> list[Any]:
    found = [value] if isinstance(value, dict | list) and value else []
    children = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        for child in children:
            found += _containers(child)
    return found


def _json_value(random_: random.Random, file: Path, marker: Path) -> None:
    contents = json.loads(file.read_text())
    if not isinstance(contents, dict | list):
        return
    top = random_.random() < 0.6 or not _containers(contents)
    place = contents if top else random_.choice(_containers(contents))
    keys = list(place) if isinstance(place, dict) else range(len(place))
    if keys:
        place[random_.choice(list(keys))] = random_.choice(VALUES)
    file.write_text(json.dumps(contents))


def _json_key(random_: random.Random, file: Path, marker: Path) -> None:
    contents = json.loads(file.read_text())
    if not isinstance(contents, dict):
        return  # an earlier damage left a bare string or number
    if contents and random_.random() < 0.5:
        del contents[random_.choice(sorted(contents))]
    else:
        name = random_.choice(
            ["auto_map", "quantization_config", "megatron_config", "corda_config", "use_dora",
             "layer_replication", "target_parameters", "runtime_config", "weight_map", "unheard_of",
             "architectures", "trust_remote_code", "bias", "rank_pattern", "alpha_pattern"]
        )  # fmt: skip
        contents[name] = random_.choice(VALUES)
    file.write_text(json.dumps(contents))


def _json_text(random_: random.Random, file: Path, marker: Path) -> None:
    file.write_text(random_.choice(JSON_TEXTS))


def _json_number(random_: random.Random, file: Path, marker: Path) -> None:
    text = file.read_text()
    places = [place for place, letter in enumerate(text) if letter.isdigit()]
    if places:
        place = random_.choice(places)
        new = random_.choice(["9", "-1", "1e400", "99999999", "null", "0.5"])
        file.write_text(text[:place] + new + text[place + 1 :])


def _header(random_: random.Random, file: Path, marker: Path) -> None:
    """A well-formed safetensors file whose header lies."""
    content = file.read_bytes()
    if len(content) < 8:
        return  # an earlier damage cut it off
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = random_.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    choice = random_.randrange(6)
    if choice == 0:
        entry["shape"] = random_.choice([[], [0], [10**9, 10**9], [-1, 4], [2, 2], ["x"]])
    elif choice == 1:
        entry["dtype"] = random_.choice(["I64", "F16", "BF16", "F8_E4M3", "BOOL", "nonsense"])
    elif choice == 2:
        entry["data_offsets"] = random_.choice([[0, 10**12], [-5, 3], [4, 0], [], [0, 0]])
    elif choice == 3:
        header[random_.choice(["../evil", "", "a" * 9000, "x.lora_A.weight"])] = header.pop(name)
    elif choice == 4:
        length = random_.choice([0, 1, 2**63, 10**9])
        file.write_bytes(struct.pack("<Q", length) + content[8:])
        return
    else:
        for key in list(header):
            if random_.random() < 0.5:
                header.pop(key)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
