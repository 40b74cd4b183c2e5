"""The boxes in which code is graded; in: programs and inputs, out: Executions.

Three boxes, each started when it is first needed: for the compiler, for solutions, and for special checkers, which see
expected outputs and therefore run where no solution ever runs.
"""

import contextlib
import functools
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from magistral_jax.verify.code_compile import Compiler
from magistral_jax.verify.code_tests import Language, Program
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.sandbox.box import Box
from magistral_jax.verify.sandbox.execution import Execution, Limits
from magistral_jax.verify.sandbox.mechanism import Mechanism

_INSIDE = "/program"
_BINARY = "program"
_ENVIRONMENT = {"ONLINE_JUDGE": "1"}


class ProgramRunner:
    """A box and the program that is loaded in it. The box sees one folder of the host, with that program alone."""

    def __init__(self, box: Box, folder: pathlib.Path) -> None:
        """Args: `box` with the host's `folder` readable as /program."""
        self._box = box
        self._folder = folder
        self._command: list[str] | None = None

    def load_binary(self, binary: bytes, files: Sequence[str] = ()) -> None:
        """Run this binary from now on, with the paths of these files of the folder as arguments."""
        path = self._unload()
        path.write_bytes(binary)
        path.chmod(0o755)
        self._command = [self._path(_BINARY), *map(self._path, files)]

    def load_python(self, source: str, files: Sequence[str] = ()) -> None:
        """Run this Python program from now on, as `__main__`; arguments as for a binary."""
        if files:
            arguments = [*map(self._path, files)]
            source = f"import sys\nsys.argv[1:] = {arguments!r}\nexec(compile({source!r}, 'program.py', 'exec'))\n"
        self._unload()
        self._box.load_python(source.encode("utf-8", "replace"))

    @contextlib.contextmanager
    def files(self, contents: Mapping[str, bytes]) -> Iterator[None]:
        """Within this block the folder holds these files beside the program."""
        try:
            for name, content in contents.items():
                (self._folder / name).write_bytes(content)
                (self._folder / name).chmod(0o644)
            yield
        finally:
            for name in contents:
                (self._folder / name).unlink(missing_ok=True)

    def run(self, stdin: bytes, limits: Limits) -> Execution:
        """Run the loaded program.

        Raises:
          BoxError: The box failed; that says nothing about the program.
        """
        if self._command is None:
            return self._box.run_python(stdin=stdin, limits=limits)
        return self._box.run(self._command, stdin=stdin, limits=limits, environment=_ENVIRONMENT)

    def _unload(self) -> pathlib.Path:
        """Take the binary away, which may be another one's right solution; returns where it was."""
        self._command = None
        path = self._folder / _BINARY
        path.unlink(missing_ok=True)
        return path

    def _path(self, name: str) -> str:
        """What a program calls a file of the folder."""
        return self._box.path(f"{_INSIDE}/{name}")


class GraderBoxes:
    """The boxes of one grader, and what is loaded in them."""

    def __init__(self, mechanism: Mechanism, config: CodeConfig, *, folder: pathlib.Path) -> None:
        """Args: an empty `folder` of this process alone; the rest as for `CodeGrader`."""
        self._mechanism = mechanism
        self._config = config
        self._folder = folder
        self._resources = contextlib.ExitStack()
        self._loaded: dict[ProgramRunner, tuple[Program, str]] = {}

    def close(self) -> None:
        """End the boxes that were started."""
        self._resources.close()

    def run(self, program: Program, stdin: bytes, limits: Limits, *, companion: str = "") -> Execution:
        """Run a solution; it is compiled unless it is the one that ran last.

        Args:
          program: The solution.
          stdin: Its standard input.
          limits: Of this run.
          companion: Second translation unit of a C++ program, see `Compiler.compile`.

        Raises:
          CompileError: It does not compile.
          BoxError: A box failed.
        """
        self._load(self._solutions, program, companion)
        return self._solutions.run(stdin, limits)

    def check(self, checker: Program, files: Mapping[str, bytes], limits: Limits) -> Execution:
        """Run a special checker with the paths of these files as its arguments; raises as `run`."""
        self._load(self._checkers, checker, "", tuple(files))
        with self._checkers.files(files):
            return self._checkers.run(b"", limits)

    def _load(self, runner: ProgramRunner, program: Program, companion: str, files: Sequence[str] = ()) -> None:
        if self._loaded.get(runner) == (program, companion):
            return
        self._loaded.pop(runner, None)
        if program.language is Language.CPP:
            runner.load_binary(self._compiler.compile(program.source, companion), files)
        else:
            runner.load_python(program.source, files)
        self._loaded[runner] = (program, companion)

    @functools.cached_property
    def _compiler(self) -> Compiler:
        scratch = self._make_folder()
        compiler = Compiler(self._mechanism, self._config, scratch=scratch)
        return self._resources.enter_context(compiler)

    @functools.cached_property
    def _solutions(self) -> ProgramRunner:
        return self._start_runner()

    @functools.cached_property
    def _checkers(self) -> ProgramRunner:
        return self._start_runner()

    def _start_runner(self) -> ProgramRunner:
        folder = self._make_folder()
        box = Box(self._mechanism, readable={_INSIDE: str(folder)}, python=True)
        return ProgramRunner(self._resources.enter_context(box), folder)

    def _make_folder(self) -> pathlib.Path:
        """A folder for one box, gone when the boxes are closed."""
        folder = pathlib.Path(self._resources.enter_context(tempfile.TemporaryDirectory(dir=self._folder)))
        folder.chmod(0o755)
        return folder
