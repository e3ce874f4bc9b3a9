"""What `lora-fsdp train` starts in every process: `python -m lora_fsdp.cli.training_process`.

Other launchers start it, too (torchrun, Ray Train). They read no accelerate YAML, so it takes
`--accelerate_config` from them.
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Sequence

from lora_fsdp.cli.configs import find_config
from lora_fsdp.distributed.launch_files import (
    OF_YAML,
    check_kind_of_launch,
    read_launch,
    read_launch_yaml,
)
from lora_fsdp.distributed.lost_hosts import watching_hosts
from lora_fsdp.errors import LaunchError
from lora_fsdp.pipeline import finetune
from lora_fsdp.printing import say
from lora_fsdp.scripts import configure_output, parse_arguments

_OPTION = "--accelerate_config"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the options say, and say what can be done with the result."""
    configure_output()
    # What was imported stays: to look through it at the process's end took over a second.
    gc.freeze()
    given = take_accelerate_config(sys.argv[1:] if arguments is None else arguments)
    run = parse_arguments(task="", arguments=given)
    with watching_hosts():  # no longer: an engine's process may live on
        result = finetune(**run)
    if run["training_args"].process_index == 0:
        folder = shlex.quote(str(result.output_dir))
        if result.task.takes_one_text:
            say(f'Ask it: lora-fsdp predict --adapter {folder} --text "..."')
        else:
            say(f"Ask it: lora-fsdp predict new.csv --adapter {folder} --output answers.csv")


def take_accelerate_config(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--accelerate_config`, whose YAML is put into the environment.

    For a launcher that reads none; a YAML with a copy of the base for each machine has one for each
    of those that are there.

    Raises:
        LaunchError: the launcher has read a YAML already, or this one cannot be carried out.
    """
    rest = list(arguments)
    if _OPTION not in rest:
        return rest
    place = rest.index(_OPTION)
    if place + 1 == len(rest):
        raise LaunchError(f"{_OPTION} is the last word: name a YAML after it.")
    name = rest[place + 1]
    del rest[place : place + 2]
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        raise LaunchError(
            f"{_OPTION} {name} is for launchers that read no YAML, and accelerate launch has read "
            "one: give it --config_file."
        )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    each = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    machines = int(os.environ.get("GROUP_WORLD_SIZE", -(-ranks // each)))
    file = find_config(name)
    check_kind_of_launch(read_launch_yaml(file))
    launch = read_launch(file, processes=ranks, machines=machines)
    os.environ.update({k: v for k, v in launch.environment.items() if k.startswith(OF_YAML)})
    return rest


if __name__ == "__main__":
    main()
