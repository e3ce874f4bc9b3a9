"""Type checkers find the library's types where it is installed, editable as `make` does it too.

Run: python -m pytest -m "slow or not slow" tests/test_types_for_users.py
"""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.documented import ROOT

BUILD = """\
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
SCRIPT = """\
from peft import LoraConfig
from transformers import TrainingArguments

from lora_fsdp import Example, FineTuningArguments, LoraTrainer, Task


def train(task: Task, examples: list[Example], rows: list[dict[str, str]]) -> None:
    trainer = LoraTrainer(
        "models/base",
        TrainingArguments("runs/a"),
        task=task,
        train_dataset=rows,
        eval_dataset={"a": examples, "b": rows},
        peft_config=LoraConfig(),
    )
    trainer.train()
    metrics: dict[str, float] = trainer.evaluate(examples)
    print(metrics, trainer.predict(examples).metrics, trainer.predict(rows).metrics)
    print(trainer.outputs(examples), trainer.write(rows), FineTuningArguments().step)
"""
MISTAKES = {
    "LoraTrainer('base').predict(5)": "arg-type",
    "LoraTrainer('base').predict('runs')": "arg-type",
    "LoraTrainer('base', compute_metrics=print)": "arg-type",
    "LoraTrainer('base', max_length='long')": "arg-type",
    "FineTuningArguments(step='fastest')": "arg-type",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is installed: a build writes beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for name in ("accelerate_configs", "lora_fsdp"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def built(source, kind, folder):
    """A wheel of `source`, as pip builds it."""
    subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_an_editable_installation_is_a_path(source, tmp_path):
    """Type checkers read a `.pth` file's paths, and run none of its imports."""
    with built(source, "build_editable", tmp_path) as wheel:
        (path,) = [name for name in wheel.namelist() if name.endswith(".pth")]
        assert wheel.read(path).decode().strip() == str(source)


def test_a_wheel_is_typed_and_holds_nothing_else(source, tmp_path):
    with built(source, "build_wheel", tmp_path) as wheel:
        names = wheel.namelist()
    assert "lora_fsdp/py.typed" in names
    assert "lora_fsdp/accelerate_configs/fsdp2.yaml" in names
    assert {name.split("/")[0] for name in names} == {"lora_fsdp", "lora_fsdp-0.1.0.dist-info"}


@pytest.mark.slow
def test_mypy_checks_a_users_script(source, tmp_path):
    pytest.importorskip("mypy", reason="`make types` installs it")
    environment, scripts, wheels = (tmp_path / name for name in ("env", "scripts", "wheels"))
    for folder in (scripts, wheels):
        folder.mkdir()
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    with built(source, "build_editable", wheels) as wheel:
        wheel.extractall(packages)
    here = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "dependencies.pth").write_text("\n".join(here))
    (scripts / "right.py").write_text(SCRIPT)
    begin = "from lora_fsdp import FineTuningArguments, LoraTrainer\n"
    for number, mistake in enumerate(MISTAKES):
        (scripts / f"wrong{number}.py").write_text(f"{begin}{mistake}\n")
    python = environment / "bin" / "python"
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--python-executable={python}", "."],
        cwd=scripts, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = checked.stdout.splitlines()
    assert not [line for line in lines if line.startswith("right.py")], checked.stdout
    for number, kind_of_error in enumerate(MISTAKES.values()):
        found = [line for line in lines if line.startswith(f"wrong{number}.py")]
        assert any(f"[{kind_of_error}]" in line for line in found), checked.stdout
