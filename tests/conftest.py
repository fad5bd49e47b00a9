"""Strict settings for every test: eight CPU devices, no implicit rank promotion, typed shapes, warnings are errors."""

import os

# Before JAX starts its backend.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes in signatures are checked at run time; installed before the first import of the package.
_hook = jaxtyping.install_import_hook("transformer", "beartype.beartype")
_hook.__enter__()


@pytest.fixture
def strict_dtypes():
    """No implicit dtype promotion (Optax and linen's norms need it, our ops, layers and objectives do not)."""
    with jax.numpy_dtype_promotion("strict"):
        yield
