"""Runs known solutions in the sandbox, several problems at a time: boxes and threads. Owns no decision."""

import contextlib
import queue
import types
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from magistral_jax.curate.code_problems import CodeProblem
from magistral_jax.records import MagistralError
from magistral_jax.verify.code_compile import CompileError
from magistral_jax.verify.code_folders import claimed_folder
from magistral_jax.verify.code_run import GraderBoxes
from magistral_jax.verify.code_tests import Program
from magistral_jax.verify.code_toolchain import prepare_toolchain
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.sandbox.box import BoxError
from magistral_jax.verify.sandbox.execution import Limits, Status
from magistral_jax.verify.sandbox.mechanism import Mechanism

T = TypeVar("T")
R = TypeVar("R")

_OUTPUT_BYTES = 2 * 2**20  # of a solution on one test

Execute = Callable[[Program, Sequence[str]], list[str | None]]
"""Runs a solution of a problem on inputs or calls; an output is None where the solution failed."""


class SolutionRuns:
    """Boxes for known solutions. A context manager: they end with it.

    Args:
      mechanism: What confines the solutions.
      config: Compiler and limits.
      num_workers: Problems that are run at a time, each in boxes of its own.
    """

    def __init__(self, mechanism: Mechanism, config: CodeConfig, num_workers: int) -> None:
        self._mechanism, self._config = mechanism, config
        self._num_workers = num_workers
        self._resources = contextlib.ExitStack()
        self._free: queue.SimpleQueue[_Boxes] = queue.SimpleQueue()

    def __enter__(self) -> "SolutionRuns":
        """Find the compiler and claim a folder for each worker."""
        prepare_toolchain(self._config.compiler)
        for _ in range(self._num_workers):
            self._free.put(self._resources.enter_context(_Boxes(self._mechanism, self._config)))
        self._threads = self._resources.enter_context(ThreadPoolExecutor(self._num_workers, "solutions"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        if error is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._resources.__exit__(kind, error, traceback)

    def map(self, decide: Callable[[T, Callable[[CodeProblem], Execute]], R], items: Iterable[T]) -> list[R]:
        """`decide(item, executor)` for each item, in order, where `executor(problem)` runs solutions of a problem."""

        def work(item: T) -> R:
            boxes = self._free.get()
            try:
                return decide(item, boxes.executor)
            finally:
                self._free.put(boxes)

        return list(self._threads.map(work, items))


class _Boxes:
    """The boxes of one worker, started anew where they break."""

    def __init__(self, mechanism: Mechanism, config: CodeConfig) -> None:
        self._mechanism, self._config = mechanism, config
        self._folder = contextlib.ExitStack()
        self._boxes: GraderBoxes | None = None

    def __enter__(self) -> "_Boxes":
        self._path = self._folder.enter_context(claimed_folder())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        self._close()
        self._folder.close()

    def executor(self, problem: CodeProblem) -> Execute:
        """What runs solutions of this problem."""
        limits = Limits(
            cpu_seconds=problem.limits.cpu_seconds,
            wall_seconds=problem.limits.wall_seconds,
            memory_mib=problem.limits.memory_mib,
            output_bytes=_OUTPUT_BYTES,
        )

        def execute(solution: Program, given: Sequence[str]) -> list[str | None]:
            printed = [self._run(*problem.program(solution, text), limits) for text in given]
            return [None if output is None else problem.output(output) for output in printed]

        return execute

    def _run(self, program: Program, stdin: bytes, limits: Limits) -> bytes | None:
        failure: BoxError | None = None
        for _ in range(2):  # what fails in a box rather than in the program is tried once more in fresh ones
            try:
                if self._boxes is None:
                    self._boxes = GraderBoxes(self._mechanism, self._config, folder=self._path)
                done = self._boxes.run(program, stdin, limits)
            except CompileError:
                return None
            except BoxError as error:
                failure = error
                self._close()
            else:
                return done.stdout if done.status is Status.OK else None
        raise MagistralError(f"the sandbox fails on a known solution, twice: {failure}")

    def _close(self) -> None:
        if self._boxes is not None:
            self._boxes.close()
            self._boxes = None
