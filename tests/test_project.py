"""The shape of the code base. Run: python -m pytest tests/test_project.py"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_fsdp"
SOURCES = sorted(PACKAGE.rglob("*.py"))
YAMLS = sorted(
    [
        ROOT / "mkdocs.yml",
        ROOT / ".pre-commit-config.yaml",
        *(ROOT / "accelerate_configs").glob("*.yaml"),
        *(ROOT / "examples").rglob("*.yaml"),
    ]
)

# A module may import from its own layer and from those before it.
LAYERS = (
    "errors",
    "printing",
    "ranks",
    "arguments",
    "tasks",
    "data",
    "base",
    "compute",
    "adapter",
    "placement",
    "sizing",
    "distributed",
    "evaluation",
    "serving",
    "training",
    "planning",
    "doctor",
    "reporting",
    "recipes",
    "options",
    "sweeps",
    "claiming",
    "pipeline",
    "estimator",
    "failures",
    "scripts",
    "notebook",
    "evaluating",
    "embedded",
    "cli",
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_source = pytest.mark.parametrize("source", SOURCES, ids=name_of)
each_yaml = pytest.mark.parametrize("path", YAMLS, ids=name_of)


def layer_of(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and layer of every import of this library, wherever in the file it stands."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lora_fsdp" and parts[1:] != ["__version__"]:
                yield node.lineno, parts[1] if len(parts) > 1 else "(the package itself)"


def test_every_module_belongs_to_a_layer() -> None:
    found = {layer_of(source) for source in SOURCES} - {"__init__", "__main__"}
    assert found <= set(LAYERS)


@each_source
def test_imports_go_one_way(source: Path) -> None:
    layer = layer_of(source)
    if layer in ("__init__", "__main__"):
        pytest.skip("the package's front door may import everything")
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    package = list(source.relative_to(ROOT).parent.parts)
    tree = ast.parse(source.read_text(encoding="utf-8"))
    wrong = [(n, name) for n, name in imported_layers(tree, package) if name not in allowed]
    assert not wrong, f"{name_of(source)} ({layer}) imports from later layers: {wrong}"


def name_of_module(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: Path, modules: set[str]) -> set[str]:
    """The modules of this library that `source` imports anywhere in it, for types too."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_fsdp"):
            for alias in node.names:
                named = f"{node.module}.{alias.name}"
                found.add(named if named in modules else str(node.module))
    return found - {"lora_fsdp"}  # the front door, which imports when it is asked


def test_no_circle_of_files() -> None:
    """Files that import one another are one file, or have a part that belongs elsewhere."""
    sources = {name_of_module(source): source for source in SOURCES}
    imports = {name: imported_modules(path, set(sources)) for name, path in sources.items()}
    try:
        tuple(TopologicalSorter(imports).static_order())
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


#: Files of a folder beside its `__init__.py`; a command or a task is a file, so these may be many.
MOST_FILES = 15
MAY_BE_LARGER = {"cli", "tasks"}


def test_rooms_are_small() -> None:
    folders = {source.parent for source in SOURCES}
    sizes = {
        folder.relative_to(PACKAGE).as_posix(): len(
            [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        )
        for folder in folders
    }
    crowded = {
        room: files
        for room, files in sizes.items()
        if files > MOST_FILES and room not in MAY_BE_LARGER
    }
    assert not crowded


def is_type_narrowing(node: ast.Assert) -> bool:
    """`assert x is not None` and `assert isinstance(x, ...)`, which only tell the type checker."""
    test = node.test
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot)
    return (
        isinstance(test, ast.Call)
        and isinstance(test.func, ast.Name)
        and test.func.id == "isinstance"
    )


@each_source
def test_errors_are_named(source: Path) -> None:
    """No bare `except:`, and no `assert` where an exception from errors.py belongs."""
    wrong = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        bare_except = isinstance(node, ast.ExceptHandler) and node.type is None
        check = isinstance(node, ast.Assert) and not is_type_narrowing(node)
        if bare_except or check:
            wrong.append(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}")
    assert not wrong, f"{name_of(source)}: {wrong}"


#: What says of which kind a task's answers are. Outside tasks/ nobody asks it: see `AnswerKind`.
KINDS = {"is_free_text", "per_row_choices"}
TASK_CLASSES = {
    name
    for source in (PACKAGE / "tasks").rglob("*.py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
    for name in [node.name]
    if name.endswith("Task") or any(getattr(base, "id", "") == "AnswerKind" for base in node.bases)
}


def asks_for_the_kind(node: ast.AST) -> bool:
    """Whether `node` finds out what sort of answers a task has, other than by its `answer_kind`."""
    if isinstance(node, ast.Attribute):
        of_task = getattr(node.value, "id", getattr(node.value, "attr", "")).endswith("task")
        return node.attr in KINDS or (node.attr == "labels" and of_task)
    if isinstance(node, ast.Compare):
        return any(
            ast.unparse(part).endswith("kind.name") for part in (node.left, *node.comparators)
        )
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"isinstance", "issubclass"}:
        names = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
        return bool(names & TASK_CLASSES)
    return False


@pytest.mark.parametrize(
    "source", [source for source in SOURCES if layer_of(source) != "tasks"], ids=name_of
)
def test_the_kind_of_answer_is_asked_for_in_tasks_alone(source: Path) -> None:
    """A branch on it would have to be found and extended for every new kind."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    wrong = [
        f"line {node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        if asks_for_the_kind(node)
    ]
    assert not wrong, f"{name_of(source)}: ask the task's `answer_kind` instead: {wrong}"


@pytest.mark.parametrize(
    "code",
    [
        "task.is_free_text",
        "self.task.per_row_choices",
        "data.task.labels is None",
        "list(predictor.task.labels or ())",
        "isinstance(task, ClassificationTask | MultipleChoiceTask)",
        "isinstance(task, (int, ColumnTask))",
        "isinstance(task.answer_kind, FreeText)",
        "task.answer_kind.name == 'free_text'",
    ],
)
def test_asking_for_the_kind_is_found(code: str) -> None:
    assert any(asks_for_the_kind(node) for node in ast.walk(ast.parse(code)))


def test_public_names_are_sorted_and_importable() -> None:
    library = importlib.import_module("lora_fsdp")
    names = list(library.__all__)
    assert names == sorted(set(names))
    missing = [name for name in names if not hasattr(library, name)]
    assert not missing


@each_yaml
def test_yaml_is_a_mapping(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize(
    "path", [path for path in YAMLS if path.parent.name == "accelerate_configs"], ids=name_of
)
def test_accelerate_reads_its_yaml(path: Path) -> None:
    """Refuses keys that accelerate does not know."""
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)) is not None
