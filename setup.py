"""Builds the package with accelerate YAMLs, recipes and their tables inside; all else is in
pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("accelerate_configs/*.yaml", "examples/recipes/*.yaml", "examples/data/*")


class BuildWithShipped(build_py):
    """An installed `lora-fsdp train` finds them beside the code; a checkout has its own."""

    def run(self) -> None:
        """Copy them, except for an editable installation."""
        super().run()
        if self.editable_mode:
            return
        for file in (file for pattern in SHIPPED for file in sorted(Path().glob(pattern))):
            target = Path(self.build_lib) / "lora_fsdp" / file
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithShipped})
