"""Strict settings for every test: eight CPU devices, no implicit rank promotion, typed shapes, warnings are errors.

With TRANSFORMER_TEST_DEVICE=1 (`make test-device`) tests run on the devices that JAX finds instead: see `ON_DEVICE`.
"""

import copy
import dataclasses
import functools
import gc
import importlib
import os
import signal
import sys
import tempfile
import threading
import types
import warnings
from typing import get_args

import beartype
import jax
import jaxtyping
import numpy as np
import pytest
from jax._src.interpreters import mlir
from slow_cases import COLLECTED, left_out

ON_DEVICE = os.environ.get("TRANSFORMER_TEST_DEVICE", "0") not in ("", "0")
"""Whether JAX chooses the devices. Products are of float32 numbers then (a GPU's may be TF32), memory is taken as it is needed,
tests of more devices than there are (`@pytest.mark.devices(8)`) are skipped, and no tolerance is below `DEVICE_TOLERANCE`, unless
the device is a CPU."""
DEVICE_TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
"""Of float32 sums in another order than a CPU's. No card was there when it was chosen."""

PARITY = os.environ.get("TRANSFORMER_TEST_PARITY", "0") not in ("", "0")
"""Whether the packages that parity is tested with must be there: what is skipped for want of one fails (`make test-parity`)."""

APPS = os.environ.get("TRANSFORMER_TEST_APPS", "0") not in ("", "0")
"""The same for the programs that runs are used with, such as lm-eval (`make test-apps`). Chromium, no package of Python,
may be absent."""

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
# Later versions abort at a flag that they do not know.
_SIMPLE_FUSIONS = " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
QUICK_TO_COMPILE = f"--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1{_SIMPLE_FUSIONS}"
"""Compilation takes most of a test's time, and programs are small. Without optimisation, tests take half the time. A program that
is not split into parts (XLA makes up to 32) is compiled in four fifths of the time. Programs that are compared with other
libraries (`PARITY`) are compiled as usual. So are programs in a test's own processes: the documentation's commands, runs of
several processes, and kills."""

# Before JAX starts its backend.
if ON_DEVICE:
    jax.config.update("jax_default_matmul_precision", "highest")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
else:
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join((given, EIGHT_DEVICES) if PARITY else (given, QUICK_TO_COMPILE, EIGHT_DEVICES))
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
# What training remembers of its user is the user's, not the tests'.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="state-")

jax.config.update("jax_numpy_rank_promotion", "raise")
# Training turns the cache of compiled programs on for the process, and it lies in the user's home. XLA once aborted while it
# wrote a program of eight devices there.
jax.config.update("jax_enable_compilation_cache", False)


_CONTEXT = threading.local()


def kept_context(make=mlir.make_ir_context):
    """Each program that JAX lowers has an MLIR context of its own, whose dialects take more time than a small program. A
    module's programs share one."""
    if not hasattr(_CONTEXT, "kept"):
        _CONTEXT.kept = make()
    return _CONTEXT.kept


mlir.make_ir_context = kept_context


def import_or_fail(name, *args, **kwargs):
    """In the place of `pytest.importorskip`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


if PARITY or APPS:
    pytest.importorskip = import_or_fail

_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def _check(function):
    """What the hook puts before a function. A config checks its own fields, and tests give it wrong ones."""
    checked = _beartype(function)
    if not function.__qualname__.endswith(".__init__"):
        return checked

    @functools.wraps(checked)
    def check_others(self, *args, **kwargs):
        settings = getattr(sys.modules.get("transformer.validation"), "Settings", ())  # it may not be imported yet
        if not isinstance(self, settings):
            checked(self, *args, **kwargs)

    return check_others


def _has_shapes(hint):
    """Whether jaxtyping's annotations occur in it. A text may contain them."""
    if isinstance(hint, str | list):
        return isinstance(hint, str) or any(map(_has_shapes, hint))
    return (isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)) or any(
        map(_has_shapes, get_args(hint))
    )


def _check_quickly(function=None, *, typechecker, jaxtyped=jaxtyping.jaxtyped):
    """`jaxtyping.jaxtyped`, whose bookkeeping of axis names costs more than the check, where the signature has axes; else the
    check alone."""
    if function is None:
        return functools.partial(_check_quickly, typechecker=typechecker)
    whole = not isinstance(function, types.FunctionType) or any(map(_has_shapes, function.__annotations__.values()))
    return jaxtyped(function, typechecker=typechecker) if whole else typechecker(function)


TYPES = os.environ.get("TRANSFORMER_TEST_TYPES", "1") not in ("", "0")
"""Whether shapes in signatures are checked at run time. 0 makes imports quick; values alone must then tell right from wrong."""
if TYPES:
    # Installed before the first import of the package. The hook wants the checker by name, and ours lets an int stand for a
    # float, as PEP 484 does.
    sys.modules["numeric_tower"] = types.SimpleNamespace(check=_check)
    jaxtyping.jaxtyped = _check_quickly  # the hook looks it up by this name
    _hook = jaxtyping.install_import_hook("transformer", "numeric_tower.check")
    _hook.__enter__()


@pytest.fixture(scope="module")
def compiled_once():
    """The runs of a module share their compiled steps where their configs differ in directories only."""
    recipe = importlib.import_module("transformer.runs.recipe")
    make, kept = recipe.Steps, {}

    def make_once(config, tokenizer, **others):
        data = dataclasses.replace(config.data, source=("text",), data_dir="")
        training = dataclasses.replace(config.training, init_from="a run" if config.training.init_from else "")
        key = dataclasses.replace(config, data=data, training=training, workdir="")
        key = key, tokenizer.kind, np.asarray(tokenizer.token_bytes).tobytes(), *others.values()
        if key not in kept:
            kept[key] = steps = make(config, tokenizer, **others)
            steps._make_state = steps._make_state  # one function, which JAX compiles once
        steps = copy.copy(kept[key])
        steps.parts = copy.copy(steps.parts)
        object.__setattr__(steps.parts, "config", config)
        return steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "Steps", make_once)
        yield


@pytest.fixture(scope="module", autouse=True)
def kinds_of_other_tests_are_unknown(request):
    """Test modules register kinds of their own, whose names would stand in the messages that others look at."""
    loaded = getattr(sys.modules.get("transformer.kinds"), "_LOADED", {})
    known = {kind.family: kind.family._kinds for kind in list(loaded.values())}
    own = ("transformer", request.module.__name__.split(".")[0], "conftest")
    for family, kinds in known.items():
        family._kinds = {name: kind for name, kind in kinds.items() if kind.__module__.split(".")[0] in own}
    yield
    for family, kinds in known.items():
        family._kinds = {**kinds, **family._kinds}


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """Every program lies in mappings of its own, of which Linux gives a process 65,530: a worker that keeps all it compiled
    aborts in the midst of a long suite."""
    yield
    vars(_CONTEXT).clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def strict_dtypes():
    """No implicit dtype promotion (Optax and linen's norms need it, our ops, layers and objectives do not)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_as_in_a_terminal():
    """Under nohup a process ignores SIGHUP, and in a script's background SIGINT; so do the runs that a test starts."""
    for name, action in (("SIGHUP", signal.SIG_DFL), ("SIGINT", signal.default_int_handler)):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), action)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the cases that `tests/slow.toml` leaves out of `make test`."""
    for item in items:
        file, name = item.location[0].replace(os.sep, "/"), getattr(item, "originalname", item.name)
        case = item.callspec.id if hasattr(item, "callspec") else ""
        COLLECTED[file, name].add(case)
        if left_out(file, name, case):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item):
    """Skip tests of more devices than there are."""
    for marker in item.iter_markers("devices"):
        (needed,), there = marker.args, jax.device_count()
        if there < needed:
            pytest.skip(f"needs {needed} devices, JAX has {there}")


def no_closer_than(tolerance, check):
    """`np.testing.assert_allclose` with tolerances that are at least these."""

    @functools.wraps(check)
    def check_loosely(actual, desired, rtol=1e-7, atol=0, *rest, **others):
        return check(actual, desired, max(rtol, tolerance["rtol"]), max(atol, tolerance["atol"]), *rest, **others)

    return check_loosely


@pytest.fixture(scope="session", autouse=True)
def tolerances_of_the_device():
    """A CPU's stay as they are."""
    if not ON_DEVICE or jax.default_backend() == "cpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.testing, "assert_allclose", no_closer_than(DEVICE_TOLERANCE, np.testing.assert_allclose))
        yield


def pytest_terminal_summary(terminalreporter):
    """How the cases of `test_fuzz.py` ended, a line for each mutation, and how many greedy texts differ after a near tie."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    properties = [both for report in reports for both in report.user_properties]
    found = [value for name, value in properties if name == "fuzz"]
    if found:
        terminalreporter.section("changed inputs")
    for name, verdict, counts in found:
        ends = ", ".join(f"{end} {count}" for end, count in sorted(counts.items()))
        terminalreporter.write_line(f"{sum(counts.values()):>6}  {name} ({verdict}): {ends}")
    if found:
        terminalreporter.write_line(f"{sum(sum(counts.values()) for _, _, counts in found):>6}  in all")
    ties = [value for name, value in properties if name == "near ties"]
    if ties:
        different, rows = map(sum, zip(*ties, strict=True))
        terminalreporter.write_line(
            f"greedy texts that differ from transformers' after a near tie: {different} of {rows}"
        )
