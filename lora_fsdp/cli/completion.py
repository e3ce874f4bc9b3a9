"""`lora-fsdp completion`: a script with which a shell completes commands, options and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import Command, required

# The words are in the script: asking Python at every key press would take half a second.
_BASH = """\
_lora_fsdp() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{nested}
    *) case "${{COMP_WORDS[1]}}" in
{cases}
        esac ;;
    esac
    [ "$COMP_CWORD" -eq 1 ] && words="{commands}"
    if [ "$COMP_CWORD" -gt 1 ] && [[ "$word" != -* ]] && [[ "$words" == --* ]]; then
        COMPREPLY=()
    else
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    fi
}}
complete -o default -F _lora_fsdp lora-fsdp
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


@dataclass
class CompletionOptions:
    """Which shell."""

    shell: Literal["bash", "zsh", "fish"] | None = option(None, "The shell that reads the script.")


def completion(options: CompletionOptions) -> int:
    """Print the script."""
    shell = required(options.shell, "SHELL", "bash, zsh or fish")
    known = option_words()
    print(_fish(known) if shell == "fish" else _bash(known, zsh=shell == "zsh"), end="")
    return 0


def option_words() -> dict[str, list[str]]:
    """For each command its options; of `train` with those of `transformers.TrainingArguments`."""
    from lora_fsdp.arguments import FineTuningArguments
    from lora_fsdp.cli.main import MODULES, commands_of

    found: dict[str, list[str]] = {}
    for command in (c for module in MODULES for c in commands_of(module).values()):
        classes = [*command.options, *([FineTuningArguments] if command.name == "train" else [])]
        names = [f.name for cls in classes for f in fields(cls) if f.init]
        found[command.name] = [f"--{name}" for name in ("config", "help", *names)]
    return found


def _bash(known: Mapping[str, Sequence[str]], *, zsh: bool) -> str:
    first = dict.fromkeys(name.split()[0] for name in known)
    nested: list[str] = []
    cases: list[str] = []
    for name, words in known.items():
        into = nested if " " in name else cases
        into.append(f'    "{name}") words="{" ".join(words)}" ;;')
    for group in first:
        if group not in known:
            inner = " ".join(name.split()[1] for name in known if name.startswith(f"{group} "))
            cases.append(f'    "{group}") words="{inner}" ;;')
    script = _BASH.format(
        nested="\n".join(nested), cases="\n".join(cases), commands=" ".join(first)
    )
    return f"{_ZSH if zsh else ''}{script}"


def _fish(known: Mapping[str, Sequence[str]]) -> str:
    first = list(dict.fromkeys(name.split()[0] for name in known))
    lines = [f'complete -c lora-fsdp -n __fish_use_subcommand -f -a "{" ".join(first)}"']
    for name, words in known.items():
        group, _, inner = name.partition(" ")
        seen = f"__fish_seen_subcommand_from {group}"
        if inner:
            lines.append(f'complete -c lora-fsdp -n "{seen}" -f -a {inner}')
            seen += f"; and __fish_seen_subcommand_from {inner}"
        lines += [f'complete -c lora-fsdp -n "{seen}" -l {word[2:]}' for word in words]
    return "\n".join(lines) + "\n"


COMMANDS = (
    Command(
        name="completion",
        summary="Print a script for shell completion.",
        examples=(
            "completion bash > ~/.lora-fsdp.bash   # and source it in ~/.bashrc",
            "completion zsh > ~/.lora-fsdp.zsh   # and source it in ~/.zshrc",
            "completion fish > ~/.config/fish/completions/lora-fsdp.fish",
        ),
        options=(CompletionOptions,),
        run=completion,
        positional="shell",
    ),
)
