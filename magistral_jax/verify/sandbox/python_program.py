"""A Python program in a fork of the runner: as `python solution.py` would run it, without the start of an interpreter.

All this happens in a confined child, compilation included. What a program may notice of its interpreter is as in a
fresh one: `__main__`, standard streams, exit codes, threads that are waited for, `atexit`, the depth of recursion.
"""

import atexit
import gc
import importlib
import io
import linecache
import os
import sys
import threading
import traceback
import types
from typing import IO, NoReturn

NAME = "solution.py"

# What programs import; loaded once, so that each of them begins with it.
_PRELOADED = (
    "abc, array, bisect, cmath, collections.abc, contextlib, copy, dataclasses, datetime, decimal, enum, fractions, "
    "functools, heapq, io, itertools, json, math, numbers, operator, pickle, queue, random, re, statistics, string, "
    "struct, textwrap, time, typing, warnings"
)
_THREAD_STACK = 8 * 2**20  # as usual on Linux; without, glibc takes 2 MiB where the main stack has no limit


def preload() -> None:
    """Load what programs import, and put it where neither collection nor reference counts touch it."""
    for name in _PRELOADED.split(", "):
        importlib.import_module(name)
    site = importlib.import_module("site")
    site.setquit()  # `exit` and `quit`, which an interpreter without site-packages lacks
    for name in [name for name in sys.modules if name.startswith("magistral_jax")]:
        del sys.modules[name]  # a program has no use for them
    gc.collect()
    gc.freeze()


def run(source_file: int) -> NoReturn:
    """Run a program to its end. Descriptors 0, 1 and 2 are its standard streams.

    Args:
      source_file: Descriptor of its source; closed before the program begins.
    """
    source = os.pread(source_file, os.fstat(source_file).st_size, 0)
    os.closerange(3, source_file + 1)
    _fresh_interpreter()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(__file__=NAME, __builtins__=sys.modules["builtins"])
    lines = source.decode(errors="replace").splitlines(keepends=True)
    linecache.cache[NAME] = (len(source), None, lines, NAME)
    code = 0
    try:
        exec(compile(source, NAME, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as request:
        code = _exit_code(request.code)
    except BaseException as error:
        _print_error(error)
        code = 1
    os._exit(_wind_up(main, code))


def _fresh_interpreter() -> None:
    sys.argv = [NAME]
    sys.stdin = sys.__stdin__ = _stream(0, "<stdin>", "r", "surrogateescape")
    sys.stdout = sys.__stdout__ = _stream(1, "<stdout>", "w", "surrogateescape")
    sys.stderr = sys.__stderr__ = _stream(2, "<stderr>", "w", "backslashreplace")
    threading.stack_size(_THREAD_STACK)
    depth = sum(1 for _ in traceback.walk_stack(None))
    sys.setrecursionlimit(sys.getrecursionlimit() + depth)  # the runner's own frames do not count
    gc.enable()


def _stream(descriptor: int, name: str, mode: str, errors: str) -> IO[str]:
    """A standard stream as the interpreter makes it: bytes beneath are its `buffer`, lines end as they are."""
    raw = io.FileIO(descriptor, mode, closefd=False)
    raw.name = name
    buffer = io.BufferedReader(raw, 2**16) if mode == "r" else io.BufferedWriter(raw, 2**13)
    return io.TextIOWrapper(buffer, "utf-8", errors, newline="\n", line_buffering=descriptor == 2)


def _exit_code(code: object) -> int:
    """As for `sys.exit(code)`."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)  # noqa: T201 (what the interpreter does)
    return 1


def _print_error(error: BaseException) -> None:
    trace = error.__traceback__.tb_next if error.__traceback__ else None  # without our own frame
    if sys.excepthook is sys.__excepthook__:
        # The built-in hook looks for the source on the disk.
        traceback.print_exception(type(error), error, trace)
    else:
        sys.excepthook(type(error), error, trace)


def _wind_up(main: types.ModuleType, code: int) -> int:
    """What an interpreter does at its end, in its order. Returns the exit code."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  (waits for threads, wakes those of pools)
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    code = _flush(code)
    main.__dict__.clear()  # files that were opened on descriptor 1 and never closed are written now
    return _flush(code)


def _flush(code: int) -> int:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except Exception:
            code = 120 if stream is sys.stdout else code
    return code
