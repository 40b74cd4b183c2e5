"""What becomes of programs in a box: every status, with input and output of every size."""

import contextlib
import os
import signal
import tempfile
import threading

import pytest

from magistral_jax.records import MagistralError
from magistral_jax.verify.sandbox.box import Box, BoxError
from magistral_jax.verify.sandbox.execution import Limits, Mechanism, Status

SHORT = Limits(cpu_seconds=0.3, wall_seconds=5.0, memory_mib=100)


@pytest.fixture(scope="module")
def box(mechanism, binaries):
    with Box(mechanism, readable={"/box": binaries}) as box:
        yield box


@pytest.fixture
def run(box):
    def run(*arguments, **options):
        return box.run([box.path("/box/programs"), *arguments], **options)

    return run


# ---- how programs end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "status", "exit_code"),
    [
        ("hello", Status.OK, 0),
        ("exit3", Status.RUNTIME_ERROR, 3),
        ("segv", Status.RUNTIME_ERROR, -signal.SIGSEGV),
        ("abort", Status.RUNTIME_ERROR, -signal.SIGABRT),
        ("throw", Status.RUNTIME_ERROR, -signal.SIGABRT),
        ("raise_term", Status.RUNTIME_ERROR, -signal.SIGTERM),
        ("close_and_exit", Status.RUNTIME_ERROR, 7),
        ("bad_alloc", Status.MEMORY_LIMIT, -signal.SIGABRT),
        ("grow", Status.MEMORY_LIMIT, -signal.SIGSEGV),
        ("endless_recursion", Status.MEMORY_LIMIT, -signal.SIGSEGV),
        ("spin", Status.TIMEOUT, -signal.SIGKILL),
        ("spin_threads", Status.TIMEOUT, -signal.SIGKILL),
        ("ignore_signals", Status.TIMEOUT, -signal.SIGKILL),
        ("close_and_spin", Status.TIMEOUT, -signal.SIGKILL),
        ("late", Status.TIMEOUT, -signal.SIGKILL),
        ("endless_output", Status.OUTPUT_LIMIT, -signal.SIGKILL),
    ],
)
def test_every_ending_has_its_status(program, status, exit_code, run):
    execution = run(program, limits=SHORT)
    assert (execution.status, execution.exit_code) == (status, exit_code), execution.stderr


@pytest.mark.parametrize("program", ["sleep", "stop", "close_and_sleep"])
def test_a_program_that_only_waits_is_ended_by_the_wall_limit(program, run):
    execution = run(program, limits=Limits(wall_seconds=0.3))
    assert execution.status is Status.TIMEOUT
    assert execution.wall_seconds >= 0.3
    assert execution.cpu_seconds < 0.3


def test_the_cpu_limit_is_kept_to_the_tenth(run):
    for program in ("spin", "ignore_signals"):
        assert 0.3 <= run(program, limits=SHORT).cpu_seconds < 0.5


def test_global_arrays_beyond_the_limit_are_a_matter_of_memory(box):
    assert box.run([box.path("/box/large")]).status is Status.MEMORY_LIMIT
    assert box.run([box.path("/box/large")], limits=Limits(memory_mib=1200)).status is Status.OK


def test_a_python_program_that_takes_too_much_memory(run_python):
    limits = Limits(memory_mib=120)
    assert run_python("x = bytearray(2 * 10**8)", limits=limits).status is Status.MEMORY_LIMIT
    assert run_python("x = []\nwhile True: x.append(x[:10**5])", limits=limits).status is Status.MEMORY_LIMIT
    assert run_python("raise MemoryError", limits=limits).status is Status.MEMORY_LIMIT  # only a name for failure
    assert (
        run_python("try:\n    x = bytearray(2 * 10**8)\nexcept MemoryError: print(1)", limits=limits).status
        is Status.OK
    )


def test_a_python_program_that_takes_too_long(run_python):
    assert run_python("while True: pass", limits=SHORT).status is Status.TIMEOUT
    assert run_python("x = 9**9**9", limits=SHORT).status is Status.TIMEOUT  # one instruction, which no alarm would end
    assert run_python("import time; time.sleep(100)", limits=Limits(wall_seconds=0.3)).status is Status.TIMEOUT
    stubborn = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert run_python(stubborn, limits=SHORT).status is Status.TIMEOUT
    at_exit = "import atexit\n@atexit.register\ndef f():\n    while True: pass"
    assert run_python(at_exit, limits=SHORT).status is Status.TIMEOUT


def test_a_program_that_kills_itself_is_not_taken_for_one_that_the_system_killed(run):
    execution = run("raise_kill")
    assert (execution.status, execution.stdout) == (Status.OK, b"alive\n")


def test_what_the_system_kills_is_a_failure_of_the_box(run, find_processes, wait_until):
    """As when the machine is out of memory: SIGKILL, and no limit was exceeded."""
    mark = f"kill-me-{os.getpid()}"
    killer = threading.Thread(target=_kill_program, args=(mark, find_processes, wait_until))
    killer.start()
    with pytest.raises(BoxError, match="killed from outside"):
        run("sleep", mark, limits=Limits(wall_seconds=30.0))
    killer.join()
    assert run("hello").status is Status.OK


def _kill_program(mark, find_processes, wait_until):
    wait_until(lambda: find_processes(mark))
    for pid in find_processes(mark):
        os.kill(pid, signal.SIGKILL)


# ---- input and output -----------------------------------------------------------------------------------------------


def test_three_megabytes_of_input(run, run_python):
    numbers = b"".join(b"%d\n" % number for number in range(450_000))
    assert len(numbers) > 3_000_000
    total = b"%d\n" % sum(range(450_000))
    assert run("sum", stdin=numbers).stdout == total
    assert run_python("import sys\nprint(sum(map(int, sys.stdin)))", stdin=numbers).stdout == total


def test_output_comes_back_byte_by_byte(run, run_python):
    data = os.urandom(2**20)
    assert run("echo", stdin=data).stdout == data
    assert run_python("import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())", stdin=data).stdout == data
    assert run("megabyte").stdout == b"x" * 2**20


def test_input_that_nobody_reads(run, run_python):
    data = bytes(3 * 2**20)
    assert run("hello", stdin=data).stdout == b"hello\n"
    assert run_python("print('hello')", stdin=data).stdout == b"hello\n"


def test_output_up_to_the_limit_is_fine_and_one_byte_more_is_not(run_python):
    source = "import sys\nsys.stdout.write('x' * int(input()))"
    limits = Limits(output_bytes=200_000)
    execution = run_python(source, stdin=b"200000", limits=limits)
    assert (execution.status, len(execution.stdout)) == (Status.OK, 200_000)
    execution = run_python(source, stdin=b"200001", limits=limits)
    assert (execution.status, len(execution.stdout)) == (Status.OUTPUT_LIMIT, 200_000)


def test_of_errors_the_end_is_kept_and_of_a_compiler_the_beginning(run):
    execution = run("some_errors")
    assert (execution.status, execution.stdout) == (Status.RUNTIME_ERROR, b"done\n")
    assert execution.stderr.endswith(b"error 19998\nerror 19999\n")
    assert len(execution.stderr) == 2048
    execution = run("some_errors", limits=Limits(may_fork=True))
    assert execution.stderr.startswith(b"error 0\nerror 1\n")
    assert len(execution.stderr) == 2048


def test_endless_errors_end(run):
    assert run("endless_errors", limits=Limits(cpu_seconds=10.0, wall_seconds=30.0)).status is Status.OUTPUT_LIMIT


def test_what_was_written_before_a_timeout_is_there(run):
    assert run("late", limits=SHORT).stdout == b"answer\n"


# ---- what honest programs need --------------------------------------------------------------------------------------


def test_recursion_to_a_million(run):
    assert run("deep").stdout == b"1000000\n"


def test_twenty_threads(run):
    assert run("threads").stdout == b"2470\n"


def test_random_numbers_and_a_larger_stack(run):
    assert run("random").stdout == b"1\n"
    assert run("raise_stack_limit").stdout == b"0\n"


def test_environment_and_folder(box, run):
    lines = run("environment", environment={"HOME": "/box"}).stdout.decode().split()
    assert "HOME=/box" in lines
    assert {line.partition("=")[0] for line in lines} <= {
        *("HOME", "PATH", "LANG", "PYTHONHASHSEED", "MALLOC_ARENA_MAX", "OPENBLAS_NUM_THREADS")
    }
    assert run("cwd").stdout == b"/\n"
    assert run("cwd", cwd=box.path("/box")).stdout.decode() == box.path("/box") + "\n"


def test_a_writable_folder_is_the_only_one(mechanism, folder, tmp_path):
    (folder / "kept").mkdir()
    with Box(mechanism, writable={"/kept": str(folder / "kept")}, python=True) as box:
        box.load_python(b"open(input(), 'w').write('x')")
        limits = Limits(file_bytes=100)
        assert box.run_python(stdin=box.path("/kept/file").encode(), limits=limits).status is Status.OK
        assert (folder / "kept" / "file").read_bytes() == b"x"
        for path in (str(folder / "other"), "/tmp/other", "/other", "other"):
            execution = box.run_python(stdin=path.encode(), limits=limits)
            assert execution.stderr.splitlines()[-1].startswith((b"PermissionError", b"OSError", b"FileNotFoundError"))
    assert not (folder / "other").exists()


def test_files_are_limited_in_size(mechanism, folder):
    with Box(mechanism, writable={"/kept": str(folder)}, python=True) as box:
        box.load_python(b"with open(input(), 'w') as file: file.write('x' * 1000)")
        path = box.path("/kept/file").encode()
        assert box.run_python(stdin=path, limits=Limits(file_bytes=1000)).status is Status.OK
        assert box.run_python(stdin=path, limits=Limits(file_bytes=999)).stderr.endswith(b"File too large\n")
        assert (folder / "file").stat().st_size <= 999


# ---- what is left ---------------------------------------------------------------------------------------------------

MAY_FORK = Limits(may_fork=True, wall_seconds=20.0)


@pytest.mark.parametrize("program", ["family", "orphans", "leave_group"])
def test_a_program_ends_with_all_that_it_started(program, run, find_processes):
    mark = f"{program}-{os.getpid()}"
    execution = run(program, mark, limits=MAY_FORK)
    assert (execution.status, execution.stdout) == (Status.OK, b"started\n")
    assert not find_processes(mark)


def test_a_family_is_killed_at_the_limit(run, find_processes):
    mark = f"late-family-{os.getpid()}"
    execution = run("family_waits", mark, limits=Limits(may_fork=True, wall_seconds=0.5))
    assert execution.status is Status.TIMEOUT
    assert not find_processes(mark)


def test_without_a_sandbox_nothing_is_left_either(binaries, find_processes):
    """Not even a daemon in a session of its own."""
    mark = f"daemon-{os.getpid()}"
    with Box(Mechanism.UNSAFE, readable={"/box": binaries}) as box:
        for program in ("family", "orphans", "leave_group"):
            execution = box.run([box.path("/box/programs"), program, mark], limits=MAY_FORK)
            assert (execution.status, execution.stdout) == (Status.OK, b"started\n")
            assert not find_processes(mark)


def test_the_next_program_finds_nothing_of_the_last_one_in_its_memory():
    """Python programs are forks of the runner: what it handles must not be theirs to search."""
    search = """
import re
pattern = re.compile(rb"Q7x[0-9]{20}x7Q")
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
    for line in maps:
        bounds, rights, *_ = line.split()
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if "r" in rights and "[v" not in line:
            memory.seek(start)
            print(pattern.findall(memory.read(end - start)))
"""
    marks = [b"Q7x" + str(digit).encode() * 20 + b"x7Q" for digit in range(4)]
    with Box(Mechanism.UNSAFE, python=True) as box:
        box.load_python(
            b"import os, sys\nos.write(1, sys.stdin.buffer.read())\nprint('Q7x' + '9' * 20 + 'x7Q')#" + marks[0]
        )
        execution = box.run_python(stdin=b"".join(marks[1:]) * 1000)
        assert execution.stdout == b"".join(marks[1:]) * 1000 + b"Q7x99999999999999999999x7Q\n"
        box.load_python(search.encode())
        execution = box.run_python()
        assert execution.status is Status.OK, execution.stderr
        assert set(execution.stdout.split()) == {b"[]"}
        box.load_python(search.encode() + b"#" + marks[0])  # the search does find what is there
        assert marks[0] in box.run_python().stdout


def test_who_keeps_its_file_user_for_the_interpreters_sake_keeps_nothing_else(mechanism, folder, monkeypatch):
    """Root's interpreter may lie in root's home, which the users of programs cannot enter."""
    is_ours = lambda path, parents: path == folder
    monkeypatch.setattr("magistral_jax.verify.sandbox.interpreter.is_open_to_others", is_ours)
    (folder / "closed").write_text("read")
    (folder / "closed").chmod(0o600)
    source = """
import os, resource
print(os.getresuid(), resource.getrlimit(resource.RLIMIT_NPROC))
print(open(input()).read())
for attempt in (lambda: os.setuid(0), os.fork, lambda: open("/etc/shadow"), lambda: os.chmod("/usr", 0o755)):
    try: print(attempt())
    except OSError as error: print(type(error).__name__)
"""
    with Box(mechanism, readable={"/box": str(folder)}, python=True) as box:
        box.load_python(source.encode())
        user, text, *attempts = box.run_python(stdin=box.path("/box/closed").encode()).stdout.decode().splitlines()
    assert text == "read"
    if os.geteuid() == 0:
        uid = box.uid
        assert user == f"{(uid, uid, uid)} (64, 64)"
    assert attempts[:2] == ["OSError", "BlockingIOError"]
    assert attempts[2] in ("PermissionError", "FileNotFoundError")
    assert attempts[3] == "OSError"


# ---- failures of the box --------------------------------------------------------------------------------------------


def test_a_program_that_is_not_there_is_a_failure_of_the_box_which_goes_on(box, run):
    with pytest.raises(BoxError, match="did not begin: FileNotFoundError"):
        box.run([box.path("/box/missing")])
    with pytest.raises(BoxError, match="did not begin: NotADirectoryError"):
        run("hello", cwd=box.path("/box/programs"))
    with pytest.raises(BoxError, match="no Python program is loaded"):
        box.run_python()
    assert run("hello").status is Status.OK


def test_a_runner_that_dies_is_a_failure_of_the_box(mechanism, find_processes, wait_until):
    mark = f"/mark-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with Box(mechanism, readable={mark: folder}) as box:
            for pid in find_processes(folder):  # it is in the settings of the runner
                with contextlib.suppress(ProcessLookupError):  # it went with the one before
                    os.kill(pid, signal.SIGKILL)
            with pytest.raises(BoxError, match="the runner is gone"):
                box.run(["/bin/true"])
            wait_until(lambda: not find_processes(folder))


def test_what_the_mechanism_says_at_its_start_is_in_the_error(mechanism):
    with pytest.raises(BoxError, match="/missing"):
        Box(mechanism, readable={"/box": "/missing"})


def test_the_users_of_programs_have_to_reach_the_folders(folder):
    (folder / "closed").mkdir(mode=0o700)
    (folder / "closed" / "inner").mkdir(mode=0o755)
    if os.geteuid() == 0:
        with pytest.raises(MagistralError, match=r"closed must be open to other users"):
            Box(Mechanism.BUBBLEWRAP, readable={"/box": str(folder / "closed")})
        with pytest.raises(MagistralError, match=r"set TMPDIR"):
            Box(Mechanism.LANDLOCK, readable={"/box": str(folder / "closed" / "inner")})
    else:  # programs stay who they are
        with Box(Mechanism.LANDLOCK, readable={"/box": str(folder / "closed")}) as box:
            assert box.run(["/bin/ls", box.path("/box")]).stdout == b"inner\n"


def test_paths_are_the_hosts_where_there_are_no_namespaces(mechanism, folder):
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    with Box(mechanism, readable={"/box": str(folder), "/box/b": str(folder / "a")}) as box:
        is_mapped = mechanism is Mechanism.BUBBLEWRAP
        assert box.path("/box/x/y") == ("/box/x/y" if is_mapped else f"{folder}/x/y")
        assert box.path("/box/b/y") == ("/box/b/y" if is_mapped else f"{folder}/a/y")
        assert box.path("/boxes") == "/boxes"
        assert box.path("/usr/bin") == "/usr/bin"
