"""`lora-fsdp verify`: whether an adapter's folder is what was trained, and fits its base."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import Command, print_json, required
from lora_fsdp.cli.terminal import write
from lora_fsdp.failures import NOT_VERIFIED


@dataclass
class VerifyOptions:
    """Which adapter, against which base."""

    adapter: str = option("", "The adapter's folder.")
    base: str | None = option(None, "Base folder or Hub name; the adapter's own if not given.")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "The base's dtype; auto = bfloat16 on GPUs."
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the base.")
    json: bool = option(False, "Print JSON.")


def verify(options: VerifyOptions) -> int:
    """Check, print each check, and say by the exit code whether one failed."""
    folder = required(options.adapter, "ADAPTER", "the adapter's folder")
    from lora_fsdp.adapter.verification import verify_adapter_folder
    from lora_fsdp.scripts import configure_output

    configure_output()
    found = verify_adapter_folder(
        folder,
        base=options.base,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    if options.json:
        checks = [dataclasses.asdict(check) for check in found.checks]
        print_json({"folder": str(found.folder), "base": found.base, "passed": found.passed,
                    "checks": checks})  # fmt: skip
    else:
        write(str(found))
    return 0 if found.passed else NOT_VERIFIED


COMMANDS = (
    Command(
        name="verify",
        summary="Check an adapter's folder: files, base, tokenizer, answers.",
        examples=("verify runs/mine", "verify runs/mine --base models/base --json"),
        options=(VerifyOptions,),
        run=verify,
        positional="adapter",
    ),
)
