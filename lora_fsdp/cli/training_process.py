"""What `lora-fsdp train` starts in every process: `python -m lora_fsdp.cli.training_process`."""

import shlex

from lora_fsdp.pipeline import finetune
from lora_fsdp.printing import say
from lora_fsdp.scripts import parse_arguments


def main() -> None:
    """Train as the options say, and say what can be done with the result."""
    run = parse_arguments(task="")
    result = finetune(**run)
    if run["training_args"].process_index == 0:
        folder = shlex.quote(str(result.output_dir))
        if result.task.takes_one_text:
            say(f'Ask it: lora-fsdp predict --adapter {folder} --text "..."')
        else:
            say(f"Ask it: lora-fsdp predict new.csv --adapter {folder} --output answers.csv")


if __name__ == "__main__":
    main()
