"""`lora-fsdp merge`: base and adapter as one ordinary model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import Command, print_json, required
from lora_fsdp.cli.terminal import write


@dataclass
class MergeOptions:
    """What is merged, and how it is written."""

    adapter: str = option("", "The adapter's folder.")
    output_dir: str | None = option(None, "Folder of the new model; must not hold anything.")
    base: str | None = option(None, "Base folder or Hub name; the adapter's own if not given.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "Of the written weights; auto = as the base has them."
    )
    max_shard_size: str = option("5GB", "Size of a weight file.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the base.")
    json: bool = option(False, "Print the result as JSON.")


def merge(options: MergeOptions) -> int:
    """Merge, and say what was written."""
    adapter = required(options.adapter, "ADAPTER", "the adapter's folder")
    output = required(options.output_dir, "--output_dir", "the new model's folder")
    from lora_fsdp.adapter.merging import merge_adapter
    from lora_fsdp.scripts import configure_output

    configure_output()
    result = merge_adapter(
        adapter,
        output,
        base=options.base,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        trust_remote_code=options.trust_remote_code,
    )
    if options.json:
        print_json({"output": str(result.output), "base": result.base, "dtype": result.dtype,
                    "merged": result.merged, "files": list(result.files), "bytes": result.bytes,
                    "notes": list(result.notes)})  # fmt: skip
    else:
        write(str(result))
    return 0


COMMANDS = (
    Command(
        name="merge",
        summary="Write base and adapter as one model, which needs no PEFT.",
        examples=("merge runs/mine --output_dir models/mine-merged",),
        options=(MergeOptions,),
        run=merge,
        positional="adapter",
    ),
)
