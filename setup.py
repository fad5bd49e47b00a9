"""What pyproject.toml cannot say: a wheel has configs/ inside the package, as transformer/configs."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the configs beside the package's files, but for an editable installation, which reads them where they are."""

    def run(self) -> None:
        """The package, then the configs."""
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib, "transformer", "configs")
            target.mkdir(parents=True, exist_ok=True)
            for config in sorted(pathlib.Path("configs").glob("*.py")):
                shutil.copyfile(config, target / config.name)


setup(cmdclass={"build_py": BuildWithConfigs})
