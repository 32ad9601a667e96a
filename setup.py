"""What pyproject.toml cannot say: folders beside the package that are inside it once it is installed."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BESIDE = ("ds_configs", "slurm")
"""`pipeline.files.home` finds them in either place."""


class BuildWithFoldersBeside(build_py):
    """Builds the package, and copies those folders into it; an editable installation has them in the checkout."""

    def run(self) -> None:
        if self.editable_mode:
            return super().run()
        package = Path(self.build_lib, "pipeline")
        shutil.rmtree(package, ignore_errors=True)  # files of an earlier build that the source no longer has
        super().run()
        for folder in BESIDE:
            shutil.copytree(folder, package / folder)
        return None


setup(cmdclass={"build_py": BuildWithFoldersBeside})
