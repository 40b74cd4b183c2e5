"""A grader's own process, confined for good."""

import subprocess
import sys

import pytest

from magistral_jax.verify.sandbox.execution import Mechanism

CONFINED = """
import ctypes, decimal, os, socket, sys, threading
from magistral_jax.verify.sandbox.execution import Mechanism
from magistral_jax.verify.sandbox.grader import confine_grader
ours, theirs = socket.socketpair()
libc = ctypes.CDLL(None, use_errno=True)
kept = open(sys.argv[2], "rb")
confine_grader(Mechanism(sys.argv[1]), memory_mib=600, readable=[*sys.path, sys.prefix, sys.base_prefix])
secret = sys.argv[2]
"""
HARMLESS = {
    "socket": "ours.sendall(b'x' * 1000); print(len(theirs.recv(1000)))",
    "file that was open": "print(len(kept.read()))",
    "import": "import fractions, colorsys; print(fractions.Fraction(1, 3) * 3000)",
    "compiled module": "import _decimal, _ctypes_test; print(1000)",
    "thread": "t = threading.Thread(target=print, args=(1000,)); t.start(); t.join()",
    "abort": "print(1000, flush=True); os.abort()",
}
ATTACKS = {
    "read": "open(secret).read()",
    "write": "open('/tmp/sandbox-grader', 'w')",
    "write to what can be read": "open(os.__file__, 'r+')",
    "truncate": "os.truncate(secret, 0)",
    "chmod": "os.chmod(secret, 0)",
    "fork": "os.fork()",
    "exec": "os.execv('/usr/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/usr/bin/true', ['true'], {})",
    "socket": "socket.socket()",
    "kill": "os.kill(os.getppid(), 0)",
    "kill itself": "os.kill(os.getpid(), 9)",
    "ptrace": "assert libc.ptrace(0x4206, os.getppid(), 0, 0) == 0",
    "process": "open(f'/proc/{os.getppid()}/environ')",
    "memory": "bytearray(700 * 2**20)",
    "memfd": "os.memfd_create('x')",
    "user": "os.setuid(12345)",
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
}


def run(source, mechanism, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s" * 1000)
    return subprocess.run(
        [sys.executable, "-c", CONFINED + source, mechanism.value, str(secret)], capture_output=True, check=False
    )


@pytest.mark.parametrize("name", HARMLESS)
def test_what_grading_needs_works(name, mechanism, tmp_path):
    ended = run(HARMLESS[name], mechanism, tmp_path)
    assert ended.stdout == b"1000\n", ended.stderr
    assert ended.returncode == (-6 if name == "abort" else 0)


@pytest.mark.parametrize("name", ATTACKS)
def test_all_else_fails(name, mechanism, tmp_path):
    ended = run(f"{ATTACKS[name]}\nprint('ESCAPED')", mechanism, tmp_path)
    assert ended.returncode == 1, ended
    assert b"ESCAPED" not in ended.stdout
    assert b"confine_grader" not in ended.stderr


def test_without_a_sandbox_only_memory_is_limited(tmp_path):
    assert run(ATTACKS["read"], Mechanism.UNSAFE, tmp_path).returncode == 0
    assert run(ATTACKS["memory"], Mechanism.UNSAFE, tmp_path).returncode == 1


def test_sympy_grades_and_executes_nothing(mechanism, tmp_path):
    source = """
import sympy
print(sympy.simplify(sympy.sympify("(x-1)*(x+1) - (x**2-1)")))
sympy.sympify("__import__('os').system('touch /tmp/sandbox-grader')")
"""
    ended = run(source, mechanism, tmp_path)
    assert ended.stdout.startswith(b"0\n"), ended.stderr
