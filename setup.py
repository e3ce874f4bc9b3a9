"""Builds the package with the accelerate YAMLs inside; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """An installed `lora-fsdp train` finds the YAMLs beside the code; a checkout has its own."""

    def run(self) -> None:
        """Copy them, except for an editable installation."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "lora_fsdp" / "accelerate_configs"
        self.mkpath(str(target))
        for config in sorted(Path("accelerate_configs").glob("*.yaml")):
            self.copy_file(str(config), str(target / config.name))


setup(cmdclass={"build_py": BuildWithConfigs})
