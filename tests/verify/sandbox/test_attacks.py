"""Attacks on both boxes, in C++ and in Python, at run time and at compile time. None reaches its aim.

Each attack checks itself whether it did, and says ESCAPED. That they are attacks is shown where nothing confines them.
"""

import dataclasses
import os
import pathlib
import socket
import tempfile

import pytest

from magistral_jax.verify.sandbox.box import Box
from magistral_jax.verify.sandbox.execution import Limits, Mechanism, Status

HERE = pathlib.Path(__file__).parent
SECRET = b"the-secret-of-the-host"
VARIABLE = "SANDBOX_TEST_SECRET"
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/dev", "/run", "/", "/usr", "/etc", "/home", "/root", "/var", ".")
LIMITS = Limits(cpu_seconds=2.0, wall_seconds=10.0, memory_mib=300)

# No aim of these is reached without a sandbox either: limits of the kernel stand in the way, or the machine lacks what
# they are after; or they would harm it.
NO_CANARY = {
    *("own_environment", "fill_disk", "memory", "shared_mapping", "many_mappings", "descriptors", "cpu_limit"),
    *("write_to_stdin", "grow_stdin", "inherited_descriptors", "forge_reply", "x32_system_calls", "other_system_calls"),
    *("mount", "clock", "memfd_secret", "disk_device", "mmap_memory_of_machine", "truncate_by_reading", "raise_limits"),
    *("type_into_terminal", "list_homes", "read_hostname", "fork_bomb", "posix_queue", "named_memory", "lock_memory"),
    *("threads", "io_uring", "userfaultfd", "xattr", "handle", "open_tree", "new_session", "setns"),
}
# Only root reaches the aim.
NEEDS_ROOT = {
    *("netlink", "packet_socket", "become_root", "chroot", "thread_namespace", "hostname", "kernel_log"),
    *("realtime", "nice", "own_filter", "bpf", "perf", "fanotify", "kill_all", "huge_pipes", "chown", "hardlink"),
}


@pytest.fixture(scope="module")
def targets():
    """What attacks aim at: files, sockets and a process of the host."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.bind(("127.0.0.1", 0))
        abstract.bind("")
        unix.bind(f"{folder}/socket")
        abstract.listen()
        unix.listen()
        os.chmod(f"{folder}/socket", 0o777)
        threads = int(pathlib.Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
        yield {
            "folder": folder,
            "secret": f"{folder}/secret",
            "writable": f"{folder}/writable",
            "unix": f"{folder}/socket",
            "abstract": abstract.getsockname()[1:].decode(),
            "tcp": str(tcp.getsockname()[1]),
            "udp": str(udp.getsockname()[1]),
            "pid": str(os.getpid()),
            "threads": str(threads + 3000),
        }


@pytest.fixture(autouse=True)
def _fresh_files(targets):
    os.chmod(targets["folder"], 0o777)
    for path in pathlib.Path(targets["folder"]).iterdir():
        if path.name != "socket":
            path.rmdir() if path.is_dir() else path.unlink()
    for name, mode in (("secret", 0o644), ("writable", 0o666)):
        path = pathlib.Path(targets["folder"], name)
        path.write_bytes(SECRET)
        path.chmod(mode)


@pytest.fixture(autouse=True)
def _secret_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, SECRET.decode())


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(find_stray_processes, wait_until):
    """When all boxes of this module are closed, no process of theirs is there, and no file anywhere."""
    yield
    wait_until(lambda: not find_stray_processes())
    assert not [path for place in PLACES for path in pathlib.Path(place).glob("sandbox-attack*")]


def harm(targets):
    """What an attack has changed on the host."""
    found = {path.name for path in pathlib.Path(targets["folder"]).iterdir()} ^ {"secret", "writable", "socket"}
    for name, mode in (("secret", 0o644), ("writable", 0o666)):
        path = pathlib.Path(targets["folder"], name)
        if not path.exists() or path.read_bytes() != SECRET or path.stat().st_mode & 0o7777 != mode:
            found.add(name)
    return found


def has_escaped(execution):
    return b"ESCAPED" in execution.stdout or SECRET in execution.stdout + execution.stderr


def read_sections(name, mark="#### "):
    """Sources by name, from a file in which each begins with a line of a mark and its name."""
    parts = (HERE / name).read_text(encoding="utf-8").split(mark)[1:]
    return {name: source for name, _, source in (part.partition("\n") for part in parts)}


# ---- C++ ------------------------------------------------------------------------------------------------------------


def cpp_attacks():
    """The names, from the table in the source."""
    table = (HERE / "attacks.cpp").read_text(encoding="utf-8").partition("attacks = {")[2]
    return [line.split('"')[1] for line in table.splitlines() if line.startswith('    {"')]


def attack(box, name, targets, limits=LIMITS):
    path = box.path("/box/attacks")
    words = [f"{key}={value}" for key, value in {**targets, "self": path, "program": box.path("/box/large")}.items()]
    return box.run([path, name, *words], stdin=b"input", limits=limits)


@pytest.fixture(scope="module")
def cpp_box(mechanism, binaries):
    with Box(mechanism, readable={"/box": binaries}) as box:
        yield box


@pytest.mark.parametrize("name", cpp_attacks())
def test_cpp(name, cpp_box, targets):
    execution = attack(cpp_box, name, targets)
    assert not has_escaped(execution), execution.stdout
    assert not harm(targets)
    assert execution.status in (Status.OK, Status.RUNTIME_ERROR, Status.MEMORY_LIMIT)
    assert cpp_box.run([cpp_box.path("/box/programs"), "hello"]).stdout == b"hello\n"


@pytest.fixture(scope="module")
def open_cpp_box(binaries):
    with Box(Mechanism.UNSAFE, readable={"/box": binaries}) as box:
        yield box


@pytest.mark.parametrize("name", [name for name in cpp_attacks() if name not in NO_CANARY])
def test_cpp_without_a_sandbox(name, open_cpp_box, targets):
    execution = attack(open_cpp_box, name, targets)
    assert has_escaped(execution) or (name in NEEDS_ROOT and os.geteuid() != 0), execution


# ---- Python ---------------------------------------------------------------------------------------------------------

PREAMBLE = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
target = {targets!r}
def escaped(*what):
    os.write(1, ("ESCAPED: %s" % (what,)).encode())
"""
PYTHON = read_sections("attacks_python.txt")
# Nothing stops these outside either, or nothing is there to be found.
NO_PYTHON_CANARY = {
    *("environment", "stray_null", "descriptors", "write_to_all_descriptors", "write_to_stdin", "runner_channel"),
    *("runner_frames", "cpu_limit", "limits", "memory", "memory_in_pieces", "become_root_for_files", "shared_memory"),
    *("temporary_file", "environ_of_parent", "memory_of_parent", "kill_group", "read_expected_output"),
}
PYTHON_NEEDS_ROOT = {"chroot", "become_root", "write_module"}


def python_attack(box, name, targets):
    box.load_python((PREAMBLE.format(targets=targets) + PYTHON[name]).encode())
    return box.run_python(stdin=b"input", limits=LIMITS)


@pytest.mark.parametrize("name", PYTHON)
def test_python(name, python_box, targets):
    execution = python_attack(python_box, name, targets)
    assert not has_escaped(execution), execution.stdout
    assert not harm(targets)
    assert execution.status in (Status.OK, Status.RUNTIME_ERROR, Status.MEMORY_LIMIT)
    python_box.load_python(b"print(1)")
    assert python_box.run_python().stdout == b"1\n"


@pytest.fixture(scope="module")
def open_python_box():
    with Box(Mechanism.UNSAFE, python=True) as box:
        yield box


@pytest.mark.parametrize("name", [name for name in PYTHON if name not in NO_PYTHON_CANARY])
def test_python_without_a_sandbox(name, open_python_box, targets):
    execution = python_attack(open_python_box, name, targets)
    assert has_escaped(execution) or (name in PYTHON_NEEDS_ROOT and os.geteuid() != 0), execution


# ---- while compiling ------------------------------------------------------------------------------------------------

COMPILER = read_sections("attacks_compiler.txt", "//// ") | {
    "macros": "#define A0 1\n"
    + "".join(f"#define A{i + 1} A{i}, A{i}, A{i}, A{i}\n" for i in range(13))
    + "int x[] = {A13};",
    "parentheses": "int x = " + "(" * 200_000 + "1" + ")" * 200_000 + ";",
    "long_expression": "int y;\nint x = " + "y + " * 40_000 + "1;",
    "long_name": "int " + "x" * 5_000_000 + ";",
}
COMPILER_LIMITS = Limits(cpu_seconds=0.9, wall_seconds=20.0, memory_mib=1024, file_bytes=64 * 2**20, may_fork=True)
COMPILER_WITHOUT_CANARY = {"include_environment", "is_newer", "embed", "precompiled", "include_relative"}
LEAKS = [name for name, source in COMPILER.items() if "@secret@" in source or "passwd" in source]


# What only takes long is seen to be stopped soon.
BOMB_LIMITS = dataclasses.replace(COMPILER_LIMITS, wall_seconds=1.0)


def compile_attack(mechanism, name, targets, scratch):
    """The execution, and the bytes of all files that it left."""
    source = COMPILER[name].replace("@secret@", targets["secret"]) + "\nint main() {}\n"
    with Box(mechanism, writable={"/scratch": scratch}) as box:
        command = ["/usr/bin/g++", "-std=c++20", "-w", "-x", "c++", "-", "-o", box.path("/scratch/program")]
        environment = {"TMPDIR": box.path("/scratch")}
        limits = COMPILER_LIMITS if name in LEAKS else BOMB_LIMITS
        execution = box.run(
            command, stdin=source.encode(), limits=limits, cwd=box.path("/scratch"), environment=environment
        )
    return execution, [path.read_bytes() for path in pathlib.Path(scratch).rglob("*") if path.is_file()]


def has_leaked(execution, files):
    seen = [execution.stdout, execution.stderr, *files]
    return any(word in text for text in seen for word in (SECRET, b"ESCAPED", b"root:", b"nobody:"))


@pytest.mark.parametrize("name", COMPILER)
def test_compiler(name, mechanism, targets, folder):
    execution, files = compile_attack(mechanism, name, targets, str(folder))
    assert not has_leaked(execution, files), execution.stderr
    assert not harm(targets)
    assert sum(map(len, files)) <= 3 * COMPILER_LIMITS.file_bytes
    assert execution.cpu_seconds < 4
    assert execution.status in (Status.OK, Status.RUNTIME_ERROR, Status.TIMEOUT, Status.MEMORY_LIMIT)


@pytest.mark.parametrize("name", [name for name in LEAKS if name not in COMPILER_WITHOUT_CANARY])
def test_compiler_without_a_sandbox(name, targets, folder):
    execution, files = compile_attack(Mechanism.UNSAFE, name, targets, str(folder))
    assert has_leaked(execution, files), execution.stderr
