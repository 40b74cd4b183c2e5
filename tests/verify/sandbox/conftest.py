"""Boxes of each mechanism, kept for all tests of a module: they are made to be used again."""

import contextlib
import os
import pathlib
import re
import subprocess
import tempfile
import time

import pytest

from magistral_jax.verify.sandbox.box import Box
from magistral_jax.verify.sandbox.execution import Mechanism

HERE = pathlib.Path(__file__).parent


@pytest.fixture(
    scope="module", params=[Mechanism.BUBBLEWRAP, Mechanism.LANDLOCK], ids=lambda mechanism: mechanism.value
)
def mechanism(request):
    return request.param


@pytest.fixture(scope="module")
def python_box(mechanism):
    with Box(mechanism, python=True) as box:
        yield box


@pytest.fixture
def run_python(python_box):
    """Runs a source once: `run_python(source, stdin=..., limits=...)`."""

    def run(source, **options):
        python_box.load_python(source.encode() if isinstance(source, str) else source)
        return python_box.run_python(**options)

    return run


@pytest.fixture
def folder():
    """A new folder that every user can read."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield pathlib.Path(path)


def compile_cpp(source, binary):
    """Compile a program of ours, unconfined."""
    command = ["g++", "-std=c++20", "-O1", "-static", "-w", "-x", "c++", "-", "-o", str(binary)]
    subprocess.run(command, input=source, check=True)


@pytest.fixture(scope="session")
def binaries():
    """A folder with compiled C++ programs: `programs` and `attacks` take a name; `large` has a gigabyte of globals."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        for name in ("programs", "attacks"):
            compile_cpp((HERE / f"{name}.cpp").read_bytes(), pathlib.Path(path, name))
        compile_cpp(b"int large[1 << 28]; int main() { return large[5]; }", pathlib.Path(path, "large"))
        yield path


def processes_with(word, file):
    """Processes but this one that have a word in a file of /proc, as far as this user may read it."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if word.encode() in entry.joinpath(file).read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.fixture(scope="session")
def find_processes():
    """Finds processes, in boxes too, by a word of their command line."""
    return lambda word: processes_with(word, "cmdline")


@pytest.fixture(scope="session")
def find_stray_processes():
    """Finds what a box has left behind: a process of a user that no box holds, or one of ours with a runner's settings.

    Other test runs, and their boxes, may go on beside."""

    def find():
        held = set(map(int, re.findall(r"@magistral-jax-user-(\d+)", pathlib.Path("/proc/net/unix").read_text())))
        of_boxes = set(range(64001, 64001 + 1024)) - held
        users = [path for path in pathlib.Path("/proc").iterdir() if path.name.isdigit() and _user(path) in of_boxes]
        return [*users, *processes_with(f'"host_pid": {os.getpid()},', "cmdline")]

    return find


def _user(path):
    try:
        return path.stat().st_uid
    except FileNotFoundError:
        return None


@pytest.fixture(scope="session")
def wait_until():
    """Waits for a claim to become true."""

    def wait(claim):
        for _ in range(3000):
            if claim():
                return
            time.sleep(0.01)
        raise AssertionError("in vain")

    return wait
