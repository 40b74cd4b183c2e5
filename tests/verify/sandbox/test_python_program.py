"""Python programs behave in a box as they do under `python solution.py`."""

import pathlib
import subprocess
import sys

import pytest

from magistral_jax.verify.sandbox.execution import Limits, Status

HERE = pathlib.Path(__file__).parent

# Each is run by an interpreter of its own as well, and has to print and exit the same.
SAME_AS_PYTHON = {
    name: source
    for name, _, source in (
        part.partition("\n") for part in (HERE / "python_programs.txt").read_text().split("#### ")[1:]
    )
}
STDIN = "first line\r\nsecond é\n\nlast".encode()


@pytest.mark.parametrize("name", SAME_AS_PYTHON)
def test_runs_as_under_python(name, run_python, tmp_path):
    source = SAME_AS_PYTHON[name]
    (tmp_path / "solution.py").write_text(source, encoding="utf-8")
    (tmp_path / "stdin").write_bytes(STDIN)
    with open(tmp_path / "stdin", "rb") as stdin:
        ordinary = subprocess.run(
            [sys.executable, "-P", "-s", "solution.py"],
            stdin=stdin,
            capture_output=True,
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            check=False,
        )
    execution = run_python(source, stdin=STDIN)
    assert (execution.stdout, execution.exit_code) == (ordinary.stdout, ordinary.returncode)
    last_lines = [text.decode().strip().splitlines()[-1:] for text in (execution.stderr, ordinary.stderr)]
    assert last_lines[0] == last_lines[1]


def test_a_traceback_names_the_program_and_its_lines(run_python):
    execution = run_python("def f(x):\n    return 1 // x\nf(0)")
    text = execution.stderr.decode()
    assert text.startswith('Traceback (most recent call last):\n  File "solution.py", line 3, in <module>\n    f(0)\n')
    assert "return 1 // x" in text
    assert "magistral_jax" not in text
    assert execution.status is Status.RUNTIME_ERROR


@pytest.mark.parametrize(
    "source", [b"\xff\xfe", b"x = 1\0", b"(" * 10**5, b"x = " + b"-" * 10**6 + b"1", b"\n" * 10**6]
)
def test_a_source_that_is_no_program_harms_only_itself(source, run_python):
    assert run_python(source).status in (Status.RUNTIME_ERROR, Status.MEMORY_LIMIT, Status.OK)
    assert run_python("print(1)").stdout == b"1\n"


def test_a_source_that_takes_long_to_compile_is_stopped(run_python):
    source = "x = " + "(" * 90 + "0" + ", 1)" * 90 + "\n" + "y = [" + "(1, 2, 3), " * 10**6 + "]"
    execution = run_python(source, limits=Limits(cpu_seconds=0.3))
    assert execution.status is Status.TIMEOUT


def test_each_run_begins_anew(python_box):
    python_box.load_python(
        b"import collections, sys\nprint(hasattr(collections, 'mark'), len(sys.argv))\ncollections.mark = 1"
    )
    assert {python_box.run_python().stdout for _ in range(3)} == {b"False 1\n"}


def test_the_source_of_the_last_load_is_run(python_box):
    for text in (b"one", b"two"):
        python_box.load_python(b"print('" + text + b"')")
    assert python_box.run_python().stdout == b"two\n"


def test_programs_find_nothing_of_this_package(run_python):
    source = "try:\n    import magistral_jax\nexcept ImportError as e: print(e)"
    assert run_python(source).stdout == b"No module named 'magistral_jax'\n"
