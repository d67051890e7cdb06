"""Fixtures of several test files."""

import os
from fnmatch import fnmatch

import jax
import pytest
from hypothesis import HealthCheck, settings

from flax_local_attention.kernels.dispatch import attend_jvp_p, attend_p, attend_vjp_p

jax.config.update("jax_num_cpu_devices", 8)  # for tests of sharding
# Tolerances assume float32 products; GPUs and TPUs round their factors to fewer bits by default.
jax.config.update("jax_default_matmul_precision", "highest")

# A hunt draws HUNT times as many examples as CI, different ones each time. Tests multiply counts by `max_examples`.
HUNT = int(os.environ.get("HUNT", "0"))
ANY_SPEED = {"deadline": None, "suppress_health_check": tuple(HealthCheck)}
settings.register_profile("ci", max_examples=1, derandomize=True, database=None, **ANY_SPEED)
settings.register_profile("hunt", max_examples=max(HUNT, 1), print_blob=True, **ANY_SPEED)
settings.load_profile("hunt" if HUNT else "ci")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark slow all cases of a test but those that `slow_but` names; a hunt draws for all of them.

    Raises:
        pytest.UsageError: A name fits no case, so that a renamed case would leave a test out unnoticed.
    """
    unmatched = {}
    for item in () if HUNT else items:
        for mark in item.iter_markers("slow_but"):
            names = unmatched.setdefault(item.nodeid.partition("[")[0], set(mark.args))
            fitting = {name for name in mark.args if fnmatch(item.callspec.id, name)}
            names -= fitting
            if not fitting:
                item.add_marker("slow")
    missing = [f"{test}: {', '.join(sorted(names))}" for test, names in unmatched.items() if names]
    if missing and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(
            f"`slow_but` must name cases of its test, got others in {'; '.join(missing)}; rename them."
        )


@pytest.fixture
def quick_compile():
    """Halve the compile time by skipping optimisations: these programs run once, on small arrays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def spread_kernels():
    """Make lowering rules see the devices of an abstract mesh, as they do with several GPUs."""
    dispatch = pytest.importorskip("jax._src.dispatch")
    primitives = {attend_p, attend_jvp_p, attend_vjp_p}
    jax.clear_caches()  # drop programs that JAX has lowered without devices
    dispatch.prim_requires_devices_during_lowering |= primitives
    yield
    dispatch.prim_requires_devices_during_lowering -= primitives
    jax.clear_caches()  # drop programs that were lowered with them


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """A compilation cache shared by the example's runs in one session of tests."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(compiled_programs):
    """Keep runs of the example out of the user's cache of compiled programs; compile each program once, quickly."""
    from tests.example_runs import compiled_in

    with compiled_in(compiled_programs):
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A corpus that a model learns quickly."""
    from tests.example_runs import TEXT

    path = tmp_path_factory.mktemp("data") / "fox.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="session")
def whole_run(compiled_programs, text_file, tmp_path_factory):
    """An uninterrupted run of the example."""
    from tests.example_runs import compiled_in, start

    with compiled_in(compiled_programs):
        return start(tmp_path_factory.mktemp("whole") / "run", f"--data={text_file}")
