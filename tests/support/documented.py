"""The commands that README and docs name, and what runs each of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]

# The first that a command begins with says what it is.
_KINDS = {
    r"lora-fsdp download ": "download",
    r"lora-fsdp completion ": "shell",
    r"(nohup )?lora-fsdp (train|sweep) |accelerate launch |make sentiment( ARGS=|$)": "training",
    r"lora-fsdp serve |curl -s http://[0-9.:]+/(predict|v1/chat)": "tests/serving/test_serve.py",
    r"lora-fsdp ": "command",
    r"python examples/optuna_search\.py ": "tests/sweeps/test_optuna.py",
    r"pip install lm_eval|cd runs/|lm_eval run ": "tests/reporting/test_harness.py",
    r"(\w+=\S+ )?make |export |python3 -m venv |source |python -c ": "set-up",
    r"python -m (benchmarks|tests)\.": "measurement",
    r"pip install ": "packages",
    r"tar |sha256sum |mkdir |newest=|tail -f |nvidia-smi$": "tests/test_rented_gpu.py",
    r"transformers serve |curl ": "tests/test_serving.py",
}
NOT_RUN = {
    r"lora-fsdp demo .*--force": "downloads the model anew; make runs the command without --force",
    r"vllm serve ": "needs a GPU and vLLM; the page says that it is untested",
    r"docker (build|run) ": "needs a container engine; tests/test_machines.py reads the Dockerfile",
    r"export HTTPS_PROXY=": "names a proxy that is not here",
    r"pipx |uvx ": "would install torch once more; pip installs the same wheel in test_packages",
}
_HELP = re.compile(
    r"^(?:examples|from a table of your own to answers):\n((?: .*\n)+)", re.MULTILINE
)
# In a sentence: with an option or a path; a name alone is no command.
_IN_A_SENTENCE = re.compile(r"`((?:lora-fsdp [a-z\s]+|make sentiment )\S*[=/-][^`]*)`")
_FENCE = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands_of(page: str) -> list[str]:
    """The page's commands, each on one line: of its shell blocks, of the help's examples, and of
    this library's and `make` those in sentences.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[str] = []
    open_line = ""
    for line in "".join([*_FENCE.findall(text), *_HELP.findall(text)]).splitlines():
        open_line += line
        if line.endswith("\\"):
            open_line = open_line[:-1]
        elif not _is_whole(open_line):  # a text goes on in the next line
            open_line += "\n"
        elif open_line.startswith("--"):  # an option with which a command is repeated
            option, open_line = open_line, ""
            found.append(re.sub(r'"$', f' {option}"', found[-1]))
        else:
            found.append(" ".join(open_line.split()))
            open_line = ""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found += [" ".join(c.split()) for c in _IN_A_SENTENCE.findall(prose) if "NAME" not in c]
    return [command for command in found if command and command[0] != "#"]


def all_commands() -> list[str]:
    """Of all pages, each once, in order."""
    return list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def kind_of(command: str) -> str | None:
    """What runs it; `None` = nothing, for a reason in `NOT_RUN`.

    Raises:
        LookupError: neither.
    """
    if any(re.match(pattern, command) for pattern in NOT_RUN):
        return None
    for pattern, kind in _KINDS.items():
        if re.match(pattern, command):
            return kind
    raise LookupError(f"Nothing runs {command!r}: give it a test, or a reason in NOT_RUN.")


def of_kind(kind: str) -> list[str]:
    """The commands that are of it."""
    return [command for command in all_commands() if kind_of(command) == kind]


def words_of(command: str) -> list[str]:
    """Its words, as a shell reads them."""
    return shlex.split(command, comments=True)


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True
