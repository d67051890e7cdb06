"""Importing the package has no effects: no connection, process or device, and no file is opened except code."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import importlib, json, os, pkgutil, sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
events, read, written = set(), set(), set()


def note(event, arguments):
    if event != "open":
        events.add(event)
    elif not isinstance(arguments[0], int):  # a number is a file that is open already
        (written if arguments[2] & WRITING else read).add(os.fsdecode(arguments[0]))


sys.addaudithook(note)
package = importlib.import_module("flax_local_attention")
names = [package.__name__]
for module in pkgutil.walk_packages(package.__path__, "flax_local_attention."):
    names.append(importlib.import_module(module.name).__name__)
seen = {"events": sorted(events), "read": sorted(read), "written": sorted(written)}

from jax._src import xla_bridge

seen |= {"names": names, "path": [*sys.path, *package.__path__], "has_devices": xla_bridge.backends_are_initialized()}
print(json.dumps(seen))
"""

STARTING = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "urllib.",
    "http.",
)
CHANGING = (
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.",
    "tempfile.",
)


@pytest.fixture(scope="module")
def imported():
    """Python's audit events while each module is imported in a process of its own."""
    command = [sys.executable, "-B", "-c", PROGRAM]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_an_import_opens_no_connection_and_starts_no_process(imported):
    assert len(imported["names"]) > 50
    assert "import" in imported["events"]
    assert not [event for event in imported["events"] if event.startswith(STARTING)]


def test_an_import_writes_no_file(imported):
    assert not imported["written"]
    assert not [event for event in imported["events"] if event.startswith(CHANGING)]


def test_an_import_reads_no_file_but_code(imported):
    folders = tuple(folder or os.getcwd() for folder in imported["path"])
    assert [path for path in imported["read"] if path.startswith(folders)]
    outside = [path for path in imported["read"] if not path.startswith(folders)]
    assert not [path for path in outside if not path.startswith("/sys/bus/pci/")]  # JAX looks for TPUs there


def test_an_import_asks_for_no_device(imported):
    assert not imported["has_devices"]
