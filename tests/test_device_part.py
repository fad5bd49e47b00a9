"""What `make test-device` runs and how: the suite on the devices that JAX finds, here one CPU."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LISTED = (ROOT / "tests" / "device.txt").read_text().splitlines()
TESTS = """
import jax
import numpy as np
import pytest


@pytest.mark.devices(2)
def test_of_two_devices():
    assert jax.device_count() >= 2


def test_of_one():
    assert jax.device_count() == 1
    assert jax.config.jax_default_matmul_precision == "highest"
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(1.0, 1.00001)
"""


def test_the_list_names_files_that_are_there():
    options, paths = [x for x in LISTED if x.startswith("-")], [x for x in LISTED if not x.startswith("-")]
    assert options == ["-Wdefault", "-mnot exhaustive"] and len(paths) == len(set(paths)) > 20
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    assert "@tests/device.txt" in (ROOT / "Makefile").read_text()


def test_jax_chooses_the_devices(tmp_path):
    """A module beside this conftest that needs two devices where one exists."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_devices.py").write_text(TESTS)
    environment = {
        **os.environ,
        "TRANSFORMER_TEST_DEVICE": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
    }
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-rs", "--rootdir", str(tmp_path)]
    run = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs 2 devices, JAX has 1" in done.stdout


@pytest.mark.devices(8)
def test_the_suite_itself_has_eight_devices():
    assert os.environ["XLA_FLAGS"].endswith("device_count=8") or "TRANSFORMER_TEST_DEVICE" in os.environ


def test_tolerances_of_a_device_are_no_closer_than_its_own():
    seen = []
    conftest = next(module for module in list(sys.modules.values()) if hasattr(module, "no_closer_than"))
    check = conftest.no_closer_than({"rtol": 1e-3, "atol": 1e-4}, lambda *given, **others: seen.append((given, others)))
    check(1, 2)
    check(1, 2, 1e-2, 0, True)
    check(1, 2, atol=1e-9, err_msg="x")
    assert seen == [
        ((1, 2, 1e-3, 1e-4), {}),
        ((1, 2, 1e-2, 1e-4, True), {}),
        ((1, 2, 1e-3, 1e-4), {"err_msg": "x"}),
    ]
