"""What README and docs name exists. Run: python -m pytest tests/test_documentation.py"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.record import OPTION
from lora_fsdp import DataArguments, FineTuningArguments, LoraArguments, ModelArguments, errors
from tests.support.documented import commands_of, kind_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh-CN.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
ARGUMENTS = (ModelArguments, LoraArguments, DataArguments, FineTuningArguments)
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))

# Options of programs whose parser cannot be asked here.
OF_OTHERS = {
    "--nproc_per_node",  # torchrun
    "--no-deps",  # pip
    *("--shm-size", "--ipc", "--build-arg"),  # docker
    "--install",  # xcode-select
    "--global",  # git config
    *("--tasks", "--model_args"),  # lm_eval
    "--from",  # uvx
    "--exclude",  # tar
    "--strict",  # mkdocs
    "--test-only",  # sbatch
    "--cov",  # pytest-cov
    *("--arms", "--examples", "--model"),  # benchmarks.throughput
    *("--host", "--port"),  # transformers serve
    "--logdir",  # tensorboard
    *("--enable-lora", "--max-lora-rank", "--lora-modules", "--generation-config"),  # vllm serve
    "--help",
    "--inputs",  # tests/fuzz/campaign.py
    "--noticed",  # tests/distributed/campaign.py
}

# Named as the reader's own, or as what must not be.
NOT_OURS = {
    "plan.yaml",
    "recipe.yaml",
    "utils.py",
    "ticket_task.py",
    "ticket_ray.py",
    "ticket_sky.yaml",
    "ticket_trainjob.yaml",
    "FILE.yaml",
    "lm_eval.yaml",  # a run's
    "convert_hf_to_gguf.py",  # llama.cpp's
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [block for kind, block in FENCE.findall(text) if kind == language]


def files_here() -> set[str]:
    """Files of the project, without what is made or installed in its folder."""
    found: set[str] = set()
    for folder, folders, names in os.walk(ROOT):
        made = {"runs", "site", "build", "dist", "__pycache__"}
        folders[:] = [
            name
            for name in folders
            if name not in made
            and (not name.startswith(".") or name in (".ci", ".github", ".devcontainer"))
        ]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in names}
    return found


@each_page
def test_files_exist(page: Path) -> None:
    """A path from the root, or the end of one (`tasks/base.py`)."""
    here = files_here()
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.-])[\w./-]*\w\.(?:py|ya?ml|toml)\b(?![\w/(]|\.\w)", text))
    named = {re.sub(r"^(\.\./|\./)+", "", name) for name in named} - NOT_OURS
    missing = {
        name
        for name in named
        if name not in here and not any(file.endswith(f"/{name}") for file in here)
    }
    assert not missing


def options_of_scripts() -> set[str]:
    """What `parse_arguments` takes, from the same parser."""
    from trl import TrlParser

    parser = TrlParser(ARGUMENTS)  # type: ignore[arg-type]
    return {option for action in parser._actions for option in action.option_strings} | {"--config"}


def options_of_commands() -> set[str]:
    from lora_fsdp.cli.completion import option_words

    return {word for words in option_words().values() for word in words}


def options_of_accelerate() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    return {option for action in actions for option in action.option_strings}


def options_of_torchrun() -> set[str]:
    from torch.distributed.run import get_args_parser

    return {option for action in get_args_parser()._actions for option in action.option_strings}


def options_in_examples() -> set[str]:
    """Of the examples, benchmarks, and campaigns, that have a parser of their own."""
    paths = [path for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    paths += (ROOT / "tests").glob("*/campaign.py")
    sources = [path.read_text(encoding="utf-8") for path in paths]
    return {OPTION} | {
        option
        for source in sources
        for option in re.findall(r"""add_argument\(\s*["'](--[\w-]+)""", source)
    }


def test_options_exist() -> None:
    known = options_of_scripts() | options_of_commands() | options_of_accelerate()
    known |= options_of_torchrun() | options_in_examples() | OF_OTHERS
    unknown = {
        f"{name_of(page)}: {option}"
        for page in PAGES
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8"))
        if option not in known
    }
    assert not unknown


def own_fields(arguments: Any) -> Iterator[dataclasses.Field[Any]]:
    """The fields that this library declares (or declares anew)."""
    return (f for f in dataclasses.fields(arguments) if f.name in arguments.__annotations__)


def line_of(field: dataclasses.Field[Any]) -> str:
    """The field's line in the tables of the reference."""
    default = field.default
    if default is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING
        default = field.default_factory()
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, list):
        default = " ".join(default)
    shown = "none" if default in (None, "") else f"`{default}`"
    return f"| `--{field.name}` | {shown} | {field.metadata['help']} |"


def test_reference_lists_every_option() -> None:
    lines = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").splitlines()
    wanted = [line_of(field) for arguments in ARGUMENTS for field in own_fields(arguments)]
    missing = [line for line in wanted if line not in lines]
    assert not missing, "docs/reference.md lacks:\n" + "\n".join(missing)
    listed = [line for line in lines if line.startswith("| `--")]
    assert sorted(listed) == sorted(wanted)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_keys_are_options(recipe: Path) -> None:
    keys = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert {f"--{key}" for key in keys} <= options_of_scripts()


@each_page
def test_python_compiles_and_its_imports_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block, filename=name_of(page))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lora_fsdp"):
                module = importlib.import_module(str(node.module))
                absent = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not absent, f"{node.module} has no {absent}"


@each_page
def test_toml_and_yaml_are_well_formed(page: Path) -> None:
    for block in blocks(page, "toml"):
        tomllib.loads(block)
    for block in blocks(page, "yaml"):
        yaml.safe_load(block)


@each_page
def test_links_resolve(page: Path) -> None:
    """Of relative links the file; mkdocs checks the anchors."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    relative = [target for target in targets if target and "://" not in target]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert not missing


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    code = [*re.findall(r"`(make [^`]*)`", text), *blocks(page, "bash")]
    named = {name for line in code for name in re.findall(r"\bmake ([a-z]+)", line)}
    assert named <= targets


@each_page
def test_errors_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+Error)`", text))
    assert not {name for name in named if not hasattr(errors, name) and not hasattr(builtins, name)}


def test_custom_task_is_short_and_the_one_in_the_readme() -> None:
    example = (ROOT / "examples" / "custom_task.py").read_text(encoding="utf-8")
    assert len(example.splitlines()) <= 25
    [shown] = [block for block in blocks(ROOT / "README.md", "python") if "TicketTask" in block]
    assert example.endswith(shown)


def test_the_chinese_readme_has_the_commands_of_the_english_one() -> None:
    english, chinese = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
    for language in ("bash", "python", "text"):
        assert blocks(chinese, language) == blocks(english, language)
    # Likewise the headings, in order, by their level; and the pages that it links to.
    levels, links = (
        [re.findall(pattern, FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
         for page in (english, chinese)]
        for pattern in (r"^#+(?= )", r"\]\(((?:docs|examples)/[^)]*|[A-Z]+(?:\.md)?)\)")
    )  # fmt: skip
    assert levels[0] == levels[1]
    assert set(links[0]) == set(links[1]) - {"README.md"}


def test_the_readme_names_the_wheel_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"lora_fsdp-([\w.]+)-py3", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(named) == {project["version"]}


def test_the_readme_is_one_screen_and_a_little() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_trainings_of_a_reader_who_follows_the_pages_get_folders_of_their_own() -> None:
    """From README to the tasks' page: a folder that holds a run is refused, and rightly."""
    taken: dict[str, str] = {}
    for page in ("README.md", "docs/quickstart.md", "docs/tasks.md"):
        for command in commands_of(page):
            if kind_of(command) != "training" or "--resume_from_checkpoint" in command:
                continue
            for folder in re.findall(r"--output_dir ([^\s\"]+)", command):
                assert taken.setdefault(folder, command) == command, f"{page}: {folder}"
    assert len(taken) >= 5


def test_every_accelerate_config_is_explained() -> None:
    page = (ROOT / "docs" / "fsdp.md").read_text(encoding="utf-8")
    configs = [name_of(path) for path in (ROOT / "accelerate_configs").glob("*.yaml")]
    assert [config for config in configs if config not in page] == []


ARCHITECTURE = ROOT / "docs" / "architecture.md"
GLOSSARY = ROOT / "docs" / "glossary.md"
LIBRARY = ROOT / "lora_fsdp"


def endings(file: str) -> list[str]:
    """`a/b/c.py`, `b/c.py`, `c.py`."""
    parts = file.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def only_marks_a_package(path: Path) -> bool:
    """An `__init__.py` that holds no code."""
    return path.name == "__init__.py" and all(
        isinstance(node, ast.Expr) for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def test_the_architecture_names_every_file_of_the_library() -> None:
    """By the end of its path, in backticks; an end that two files have names neither."""
    paths = [
        path
        for path in LIBRARY.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    ]
    owners = Counter(ending for path in paths for ending in endings(name_of(path)))
    named = set(re.findall(r"`([\w./-]+)`", ARCHITECTURE.read_text(encoding="utf-8")))
    clear = {name for name in named if owners[name] == 1}
    unnamed = [
        name_of(path)
        for path in paths
        if not only_marks_a_package(path) and clear.isdisjoint(endings(name_of(path)))
    ]
    assert not unnamed, f"docs/architecture.md does not name {sorted(unnamed)}"


def test_the_architecture_names_functions_that_exist() -> None:
    """`finetune()`, and `Pack.lay()` as a method of that class."""
    there = set()
    for source in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                there.add(node.name)
            if isinstance(node, ast.ClassDef):
                parts = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                there |= {f"{node.name}.{part.name}" for part in parts}
    text = ARCHITECTURE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+(?:\.\w+)?)\(\)`", text))
    assert named
    assert not named - there


def glossary() -> list[list[str]]:
    """The cells of the glossary's lines: word, meaning, words that are not used for it."""
    text = GLOSSARY.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


UNUSED_WORDS = [word for *_, unused in glossary() for word in re.findall(r"`([^`]+)`", unused)]


def spellings(word: str) -> re.Pattern[str]:
    """`word` in any case, with any ending, over the end of a line, and in a Python name."""
    parts = [re.escape(part).replace("'", "['\u2019]") for part in word.split()]
    return re.compile(r"(?<![a-z])" + r"[\s_#-]+".join(parts), flags=re.IGNORECASE)


def texts_held_to_the_glossary() -> Iterator[tuple[str, str]]:
    """Name and text of pages, Python files, recipes and other settings, and reports' templates."""
    pages = [page for page in PAGES if page.name not in ("CHANGELOG.md", GLOSSARY.name)]
    pages += [ROOT / "benchmarks" / "NOTES.md", ROOT / "Makefile", ROOT / "mkdocs.yml", *RECIPES]
    pages += sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    folders = ("lora_fsdp", "tests", "benchmarks", "examples")
    sources = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in (*pages, *sources, *sorted(LIBRARY.rglob("*.jinja"))):
        yield name_of(path), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("word", UNUSED_WORDS)
def test_words_that_the_glossary_replaces_are_not_used(word: str) -> None:
    used = [
        f"{name}, line {text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for name, text in texts_held_to_the_glossary()
        for match in spellings(word).finditer(text)
    ]
    assert not used, f"docs/glossary.md has another word for {word!r}: {used}"


def test_the_glossary_is_read() -> None:
    words = [word for word, *_ in glossary()]
    assert {"row", "packed sequence", "proof"} <= set(words)
    assert len(words) == len(set(words))
    assert UNUSED_WORDS
    assert spellings("so so").search("what_So\n# SO called")
