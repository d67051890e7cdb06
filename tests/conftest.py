"""Fixtures that several test files use."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for tests of sharding
# Tolerances are those of float32; GPUs and TPUs round the factors of its products to fewer bits by default.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def quick_compile():
    """Half the time to compile; these programs run once, on a few numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
