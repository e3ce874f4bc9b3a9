"""The package as a user has it: a wheel, in an environment without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from tests.support.documented import ROOT

SOURCES = (
    "lora_fsdp", "accelerate_configs", "examples", "pyproject.toml", "setup.py", "MANIFEST.in",
    "README.md", "LICENSE",
)  # fmt: skip


def build_wheel(folder: Path) -> Path:
    """Of a copy of the sources the sdist, and of what that holds the wheel, as `build` does."""
    copy = folder / "sources"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    sdist = _build("sdist", copy, folder)
    with tarfile.open(sdist) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    return _build("wheel", unpacked, folder)


def _build(kind: str, sources: Path, folder: Path) -> Path:
    program = (
        f"from setuptools import build_meta as b; print('\\n' + b.build_{kind}({str(folder)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=sources, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def install_beside_dependencies(wheel: Path, folder: Path) -> Path:
    """The wheel in a new environment; returns the folder of its programs.

    What the package depends on is taken from this Python's environment by a path, in which files
    that lead elsewhere (an editable checkout) are not followed. It takes seconds, not minutes.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    programs = folder / "bin"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = folder / "lib" / version / "site-packages"
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet"]
    alone = ["--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, *alone, str(wheel)], check=True, timeout=300)
    return programs


def environment_of(programs: Path) -> dict[str, str]:
    """Of a shell in that environment: nothing of this process's leads to the checkout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
