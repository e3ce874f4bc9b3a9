"""A documented training, made short and put on toys."""

from __future__ import annotations

import subprocess
import sys

from tests.support.documented import words_of

SHORT = ["--max_steps", "2"]
ANEW = ["--overwrite_output_dir", "true"]


def changed(command: str) -> list[str]:
    """Options that make a training short, and put toys where it names what is not here."""
    # A token is a letter here, and a question with its choices or an answer is never cut.
    whole = any(name in command for name in ("multiple-choice", "preference"))
    more = [*SHORT, "--max_length", "512" if whole else "96"]
    if "deepseek-7b" in command:  # the recipe names the Hub's model
        more += ["--model_name_or_path", "models/deepseek-llm-7b-base"]
    if "--eval_steps" in command:
        more += ["--eval_steps", "2", "--save_steps", "2"]
    return more


def launched_words(command: str) -> list[str]:
    """The words of a launched training, with what `changed` adds."""
    words, more = words_of(command), [*changed(command), *ANEW]
    if words[0] == "make":
        return [*words[:-1], f"{words[-1]} {' '.join(more)}"]
    if "deepseek-7b" in command:  # this machine has no GPU
        config = "accelerate_configs/fsdp2_cpu.yaml"
        words = [config if word == "accelerate_configs/fsdp2.yaml" else word for word in words]
    programs = {"lora-fsdp": "lora_fsdp", "accelerate": "accelerate.commands.accelerate_cli"}
    return [sys.executable, "-m", programs[words[0]], *words[1:], *more]


def make_words(words: list[str]) -> list[str]:
    """What `make` says that it would run, where everything is set up."""
    said = subprocess.run(
        [words[0], "--dry-run", *words[1:]], capture_output=True, text=True, check=True
    )
    [line] = said.stdout.replace("\\\n", " ").splitlines()
    program, *others = words_of(line.removeprefix("exec "))
    assert program == ".venv/bin/lora-fsdp"
    return ["lora-fsdp", *others]
