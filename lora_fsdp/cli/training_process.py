"""What `lora-fsdp train` starts in every process: `python -m lora_fsdp.cli.training_process`."""

from lora_fsdp.pipeline import finetune
from lora_fsdp.printing import say
from lora_fsdp.scripts import parse_arguments


def main() -> None:
    """Train as the options say, and say what can be done with the result."""
    run = parse_arguments(task="")
    result = finetune(**run)
    if run["training_args"].process_index == 0:
        say(f'Ask it: lora-fsdp predict --adapter {result.output_dir} --text "..."')


if __name__ == "__main__":
    main()
