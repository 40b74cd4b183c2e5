"""Compiles C++ solutions in a box of their own; in: source, out: the bytes of a program, or why there is none."""

import hashlib
import os
import pathlib
import re
import secrets
import shutil
import stat
import types

from magistral_jax.verify.code_folders import BinaryCache, cache_folder
from magistral_jax.verify.code_toolchain import prepare_toolchain
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.sandbox.box import Box
from magistral_jax.verify.sandbox.execution import Execution, Limits, Status
from magistral_jax.verify.sandbox.mechanism import Mechanism

_MEMORY_MIB = 1536  # with the precompiled header a compiler needs 400
_BINARY_BYTES = 64 * 2**20
_CACHE_BYTES = 512 * 2**20  # about 200 static programs
_MESSAGE_BYTES = 64 * 2**10


_COMPANION_FLAGS = ("-Wl,--wrap=main", "-x", "c++")


class CompileError(Exception):
    """The source is no program; `path` is the kind of failure, `message` the compiler's own words."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(path, message)
        self.path = path
        self.message = message


class Compiler:
    """Compiles one program after another. A context manager: its box ends with it."""

    def __init__(self, mechanism: Mechanism, config: CodeConfig, *, scratch: pathlib.Path) -> None:
        """Start the box.

        Args:
          mechanism: What confines the compiler.
          config: Which compiler, and its limits.
          scratch: Empty folder that the compiler may write to.

        Raises:
          MagistralError: There is no compiler that can be used.
          BoxError: The box does not start.
        """
        self._toolchain = prepare_toolchain(config.compiler)
        self._scratch = scratch
        self._cache = BinaryCache(cache_folder() / "programs", _CACHE_BYTES)
        self._limits = Limits(
            cpu_seconds=config.compile_seconds,
            wall_seconds=config.compile_wall_seconds,
            memory_mib=_MEMORY_MIB,
            output_bytes=_MESSAGE_BYTES,
            file_bytes=_BINARY_BYTES,
            may_fork=True,
        )
        installation = self._toolchain.installation
        self._box = Box(
            mechanism,
            readable={
                "/headers": str(self._toolchain.headers),
                **({installation: installation} if installation else {}),
            },
            writable={"/scratch": str(scratch)},
        )

    def __enter__(self) -> "Compiler":
        self._box.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self._box.__exit__(kind, error, traceback)

    def compile(self, source: str, companion: str = "") -> bytes:
        """A program from `source` and, where given, a second translation unit.

        The companion's `__wrap_main` takes the place of `main`, which it calls as `__real_main`.

        Raises:
          CompileError: The compiler refuses it, or takes more time or memory than it may.
          BoxError: The box failed; that says nothing about the source.
        """
        made_from = repr((self._toolchain.version, self._toolchain.flags, companion, source))
        key = hashlib.sha256(made_from.encode("utf-8", "surrogatepass")).hexdigest()
        binary = self._cache.get(key)
        if binary is None:
            binary = self._compile(source, companion)
            self._cache.put(key, binary)
        return binary

    def _compile(self, source: str, companion: str) -> bytes:
        # Names that the source cannot guess: it must neither include its companion nor meet what was left behind.
        name = secrets.token_hex(8)
        extra: list[str] = []
        if companion:
            path = self._scratch / f"{name}.cpp"
            path.write_text(companion)
            path.chmod(0o644)
            extra = [*_COMPANION_FLAGS, self._box.path(f"/scratch/{name}.cpp")]
        try:
            done = self._box.run(
                [
                    self._toolchain.compiler,
                    *self._toolchain.flags,
                    f"-I{self._box.path('/headers')}",
                    *("-x", "c++", "-", *extra),
                    *("-o", self._box.path(f"/scratch/{name}")),
                ],
                stdin=with_header_first(source).encode("utf-8", "replace"),
                limits=self._limits,
                cwd=self._box.path("/scratch"),
                environment={"TMPDIR": self._box.path("/scratch"), "LC_ALL": "C"},
            )
            if done.status is not Status.OK:
                raise _compile_error(done)
            return _read_regular_file(self._scratch / name)
        finally:
            _empty(self._scratch)


_OTHER_HEADER = re.compile(r"\s*(//.*|#\s*include\s*<[^>]*>\s*(//.*)?)?")
_WHOLE_LIBRARY = re.compile(r"\s*#\s*include\s*<bits/stdc\+\+\.h>")


def with_header_first(source: str) -> str:
    """The source with the precompiled header in front, where only other headers stand before it.

    Then their order has no meaning, but the compiler would not use what is precompiled.
    """
    for number, line in enumerate(source.split("\n")):
        if _WHOLE_LIBRARY.match(line):
            return source if number == 0 else f"#include <bits/stdc++.h>\n#line 1\n{source}"
        if not _OTHER_HEADER.fullmatch(line):
            break
    return source


def _compile_error(done: Execution) -> CompileError:
    paths = {Status.TIMEOUT: "compile_timeout", Status.MEMORY_LIMIT: "compile_memory"}
    return CompileError(paths.get(done.status, "compile_error"), done.stderr.decode("utf-8", "replace").strip())


def _read_regular_file(path: pathlib.Path) -> bytes:
    """A file that was written in the box: no link out of it, no pipe."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    try:
        with open(path, "rb", opener=opener) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
    except OSError:
        pass
    raise CompileError("compile_error", "the compiler wrote no program")


def _empty(folder: pathlib.Path) -> None:
    """Delete what a compiler left behind; one that was killed leaves temporary files."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
