"""`lora-fsdp sweep`: `train` for several adapters, which says so where only one is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from lora_fsdp.arguments import DataArguments, LoraArguments, ModelArguments
from lora_fsdp.cli.train import LaunchOptions, TrainCommand, train
from lora_fsdp.errors import ArgumentError
from lora_fsdp.recipes import read_recipe

_SEVERAL = ("grid", "seeds", "folds")


def sweep(options: LaunchOptions, arguments: Sequence[str]) -> int:
    """Launch, if several adapters are asked for.

    Raises:
        ArgumentError: they are not.
    """
    given = [word.partition("=")[0] for word in arguments]
    if "--config" in given:
        place = given.index("--config")
        file = arguments[place].partition("=")[2] or (*arguments[place + 1 :], "")[0]
        recipe = read_recipe(file, options=_SEVERAL, others_allowed=True)
        given += [word.partition("=")[0] for word in recipe]
    if not {f"--{name}" for name in _SEVERAL} & set(given):
        raise ArgumentError(
            "A sweep takes several adapters: --grid learning_rate=1e-4,3e-4, --seeds 3 or "
            "--folds 5. One adapter is trained by lora-fsdp train."
        )
    return train(options, arguments)


COMMANDS = (
    TrainCommand(
        name="sweep",
        summary="Train an adapter for every setting, seed or fold over one frozen base, and say "
        "which is best.",
        examples=(
            "sweep --config recipe.yaml --grid learning_rate=1e-4,3e-4 lora_r=8,32 --seeds 3",
            "sweep --config recipe.yaml --grid examples/grid.yaml --search random --trials 6",
            "sweep --config recipe.yaml --grid learning_rate=1e-4..1e-2 lora_r=4,8,32 \\\n"
            "      --search halving --trials 12",
            "sweep --config recipe.yaml --folds 5",
        ),
        options=(LaunchOptions, ModelArguments, LoraArguments, DataArguments),
        run=sweep,
    ),
)
