"""Fixtures that several test files use."""

import jax
import pytest

from flax_local_attention import windowed
from tests.cases import SMALL_BLOCK

jax.config.update("jax_num_cpu_devices", 2)  # for tests/test_sharding.py
# Tolerances are those of float32; GPUs and TPUs round the factors of its products to fewer bits by default.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def set_block(monkeypatch):
    """Function that sets the size of a block; to be called before anything is traced."""

    def set_block(size):
        monkeypatch.setattr(windowed, "TARGET_BLOCK", size)

    return set_block


@pytest.fixture
def small_blocks(set_block):
    """Small blocks, so that a short sequence has several and a ragged last one."""
    set_block(SMALL_BLOCK)


@pytest.fixture
def quick_compile():
    """Half the time to compile; these programs run once, on a few numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
