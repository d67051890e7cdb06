"""The structure of the package: imports point one way, public names are documented, docstring examples run."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import flax_local_attention

PACKAGE = Path(flax_local_attention.__file__).parent
MODULES = sorted(name for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "flax_local_attention."))

LEVELS = (
    ("checks", "frequencies", "sharding"),
    ("array_checks", "partitioning"),
    ("window", "exchange"),
    ("rotary",),
    ("options",),
    ("operands",),
    ("softmax",),
    ("kernels",),
    ("ring_attention",),
    ("parallel",),
    ("attention",),
    ("field_checks",),
    ("cache", "fields", "flax_attention", "stacking", "tokens"),
    ("decoding", "linear"),
    ("norm", "residual_streams", "embedding", "position_bias", "head"),
    ("layers", "feed_forward"),
    ("transformer_layer",),
    ("transformer",),
    ("sampling",),
    ("generation", "convert"),
)
"""Modules by level; each may import only from the levels before its own."""

SLOW = {f"flax_local_attention.{name}" for name in ("attention", "generation", "transformer")}
"""Modules whose examples take more than a few seconds."""

ALLOWED = {"numpy", "jax", "flax", "einops", "flax_local_attention"}


def imported_modules(path):
    """Yield the modules that a file imports anywhere, and names from our own package as full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield node.module
            if node.module == "flax_local_attention":
                yield from (f"flax_local_attention.{alias.name}" for alias in node.names)


def level_of(module):
    name = module.split(".")[1]
    levels = [level for level, names in enumerate(LEVELS) if name in names]
    assert levels, f"{module} has no level: add it to LEVELS"
    return levels[0]


def source_of(module):
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    own = [name for name in imported_modules(source_of(module)) if name.startswith("flax_local_attention.")]
    for name in own:
        is_sibling_in_a_folder = name.split(".")[1] == module.split(".")[1]
        assert level_of(name) < level_of(module) or is_sibling_in_a_folder, f"{module} imports {name}"
    assert "flax_local_attention" not in set(imported_modules(source_of(module))), "import from where it is defined"


@pytest.mark.parametrize("module", ["flax_local_attention", *MODULES])
def test_only_the_declared_libraries_are_imported(module):
    roots = {
        name.split(".")[0] for name in imported_modules(source_of(module) if "." in module else PACKAGE / "__init__.py")
    }
    assert roots - set(sys.stdlib_module_names) <= ALLOWED


@pytest.mark.parametrize("module", ["checks", "window"])
def test_the_ground_floor_imports_nothing_heavy(module):
    names = set(imported_modules(source_of(f"flax_local_attention.{module}")))
    outside = {name.split(".")[0] for name in names if not name.startswith("flax_local_attention")}
    assert outside - set(sys.stdlib_module_names) <= {"numpy"}
    assert {name.split(".")[1] for name in names if name.startswith("flax_local_attention.")} <= {"checks"}


def own_members(module):
    """Yield the public functions and classes that a module defines."""
    for name, value in vars(module).items():
        is_ours = getattr(value, "__module__", None) == module.__name__
        if not name.startswith("_") and is_ours and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


def own_methods(cls):
    for name, value in vars(cls).items():
        is_a_default = inspect.isfunction(value) and not value.__qualname__.startswith(cls.__name__)
        if inspect.isfunction(value) and not is_a_default and (not name.startswith("_") or name == "__call__"):
            yield f"{cls.__name__}.{name}", value


@pytest.mark.parametrize("module", ["flax_local_attention", *MODULES])
def test_every_public_name_has_a_docstring(module):
    module = importlib.import_module(module)
    assert module.__doc__, "the module itself"
    members = list(own_members(module))
    methods = [pair for _, value in members if inspect.isclass(value) for pair in own_methods(value)]
    assert not [name for name, value in members + methods if not value.__doc__]


@pytest.mark.parametrize("module", MODULES)
def test_values_are_frozen(module):
    for value in vars(importlib.import_module(module)).values():
        if inspect.isclass(value) and dataclasses.is_dataclass(value) and not issubclass(value, nn.Module):
            assert value.__dataclass_params__.frozen, value


def test_all_lists_every_public_name():
    public = flax_local_attention.__all__
    assert public == sorted(public)
    assert all(getattr(flax_local_attention, name).__doc__ for name in public)


@pytest.mark.parametrize(
    "name", ["LocalAttention", "LocalMHA", "FeedForward", "DynamicPositionBias", "LocalTransformer"]
)
def test_every_field_of_a_module_is_in_its_docstring(name):
    module = getattr(flax_local_attention, name)
    fields = [field for field in module.__dataclass_fields__ if field not in ("parent", "name")]
    documented = re.findall(r"^    (\w+(?:, \w+)*): \S", inspect.getdoc(module), re.MULTILINE)
    documented = [field for names in documented for field in names.split(", ")]
    assert sorted(documented) == sorted(fields)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    "module",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in ("flax_local_attention", *MODULES)
    ],
)
def test_examples_in_docstrings_run(module):
    public = {name: getattr(flax_local_attention, name) for name in flax_local_attention.__all__}
    names = {"jax": jax, "jnp": jnp, "nn": nn, **public}
    module = importlib.import_module(module)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(module, extraglobs=names):
        report = []
        runner.run(test, out=report.append)
        assert not runner.failures, f"{test.name}\n" + "".join(report)


def test_there_are_examples_to_run():
    tests = [test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name))]
    assert sum(bool(test.examples) for test in tests) >= 5
