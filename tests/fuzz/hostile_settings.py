"""Recipes, launcher variables and plug-ins as an attacker, or a typing error, would send them."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

KEYS = [
    "task",
    "data_file",
    "lora_r",
    "lora_kwargs",
    "labels",
    "learning_rate",
    "output_dir",
    "max_length",
    "per_device_train_batch_size",
    "env",
    "lora_target_modules",
    "fsdp",
    "seed",
    "report_to",
    "hub_token",
    "resume_from_checkpoint",
    "max_steps",
    "dtype",
    "config",
    "7",
    "no_such_option",
    "chat_template",
    "model_name_or_path",
    "lr_scheduler_type",
]
VALUES = [
    "3",
    "-1",
    "0.5",
    "true",
    "null",
    "~",
    "[]",
    "{}",
    "[1, [2, [3]]]",
    "{a: {b: c}}",
    "text",
    "'quoted'",
    "!!python/object/apply:os.system ['touch exploded']",
    "2020-01-01",
    "0x1F",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "&a [*a]",
    "*undefined",
    "1e999",
    ".nan",
    ".inf",
    "|\n  block\n  text",
    '"\\ud800"',
    "'{\"use_dora\": true}'",
    "{1: 2, [3]: 4}",
    "!!python/name:os.system",
    "yes",
    "99999999999999999999",
    "? x",
    "@at",
    "%tag",
    "`",
]

BILLION_LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)
)


def hostile_recipe(random_: random.Random) -> bytes:
    """The contents of a YAML recipe."""
    choice = random_.randrange(12)
    if choice == 0:
        return (
            BILLION_LAUGHS + f"\n{random_.choice(['labels', 'x', 'lora_kwargs'])}: *a8"
        ).encode()
    if choice == 1:
        return random_.randbytes(200)
    if choice == 2:
        return ("[" * random_.choice([10, 5000])).encode()
    if choice == 3:
        return random_.choice([b"", b"text", b"- a\n- b", b"3", b"null", b"---\n---\n", b"\0"])
    if choice == 4:
        return ("task: a\n" * 3 + "\ttab: x").encode()
    lines = [
        f"{random_.choice(KEYS)}: {random_.choice(VALUES)}"
        for _ in range(random_.choice([1, 1, 2, 4]))
    ]
    text = "\n".join(lines).encode(random_.choice(["utf-8", "utf-16", "latin-1"]), "replace")
    return text if random_.random() < 0.8 else text[: random_.randrange(len(text) + 1)]


FSDP_KEYS = [
    "FSDP_VERSION",
    "FSDP_RESHARD_AFTER_FORWARD",
    "FSDP_AUTO_WRAP_POLICY",
    "FSDP_OFFLOAD_PARAMS",
    "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "FSDP_STATE_DICT_TYPE",
    "FSDP_ACTIVATION_CHECKPOINTING",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "FSDP_MIN_NUM_PARAMS",
    "FSDP_SHARDING_STRATEGY",
    "FSDP_BACKWARD_PREFETCH",
    "FSDP_IGNORED_MODULES",
    "FSDP_SYNC_MODULE_STATES",
    "ACCELERATE_USE_FSDP",
    "WORLD_SIZE",
]
FSDP_VALUES = [
    "",
    "true",
    "false",
    "maybe",
    "1",
    "2",
    "3",
    "-7",
    "99",
    "FULL_SHARD",
    "NO_WRAP",
    "TRANSFORMER_BASED_WRAP",
    "SIZE_BASED_WRAP",
    "SHARDED_STATE_DICT",
    "nonsense",
    "🙂",
    "LlamaDecoderLayer,",
    ",",
    "None",
    "[1]",
    "!!python/object:x",
    "(a+)+$",
]


def hostile_launch(random_: random.Random) -> dict[str, str]:
    """Variables as an accelerate YAML would set them."""
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for _ in range(random_.choice([1, 2, 4])):
        variables[random_.choice(FSDP_KEYS)] = random_.choice(FSDP_VALUES)
    return variables


def hostile_plug_in(random_: random.Random) -> list[EntryPoint]:
    """Entry points of packages that someone has installed."""
    count = random_.choice([1, 1, 2])
    names = ["sentiment", "classification", "fuzzed", "", "x y", "../x", "fuzzed"]
    values = [
        "tests.fuzz.plug_ins.raising:Task",
        "tests.fuzz.plug_ins.exiting:Task",
        "no.such:Task",
        "tests.fuzz.plug_ins.registering:Taken",
        "tests.fuzz.plug_ins.strange:NotATask",
        "tests.fuzz.plug_ins.strange:FUNCTION",
        "tests.fuzz.plug_ins.strange:RaisesWhenMade",
        "tests.fuzz.plug_ins.strange:ExitsWhenMade",
        "tests.fuzz.plug_ins.strange:Missing",
        "tests.fuzz.plug_ins.strange:Unnamed",
        "broken value",
        "tests.fuzz.plug_ins.broken_syntax:X",
        "tests.fuzz.plug_ins.strange:RaisesOnDescription",
    ]
    return [
        EntryPoint(random_.choice(names), random_.choice(values), "lora_fsdp.tasks")
        for _ in range(count)
    ]


PIECES: list[Any] = [
    "<|end|>",
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_",
    "end|>",
    "<",
    "|>",
    "\n",
    " ",
    "Output:",
    "Instruction:",
    "positive",
    "{{",
    "}}",
    "{% raw %}",
    "late",
    "🙂",
    "é",
    "\u202e",
    "\u200b",
    "\0",
    "assistant\n",
    "</s>",
]


def hostile_text(random_: random.Random) -> str:
    """A text that tries to forge control tokens."""
    return "".join(random_.choice(PIECES) for _ in range(random_.randrange(1, 40)))


Generator = Callable[[random.Random], Any]
