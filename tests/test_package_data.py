"""What is built has the files that the package reads beside its own code."""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_a_build_has_every_file_of_the_package(tmp_path):
    """By setuptools' own command, with the tables of pyproject.toml; the licence's field is newer than some versions of it."""
    shutil.copytree(ROOT / "transformer", tmp_path / "transformer", ignore=shutil.ignore_patterns("__pycache__"))
    lines = (ROOT / "pyproject.toml").read_text().splitlines(keepends=True)
    (tmp_path / "pyproject.toml").write_text(
        "".join(line for line in lines if not line.startswith(("license", "readme")))
    )
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=120)

    def files(folder):
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

    there = files(tmp_path / "transformer")
    assert files(tmp_path / "built" / "transformer") == there
    assert pathlib.Path("analysis/page/attention.js") in there
