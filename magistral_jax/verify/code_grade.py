"""Verdicts on programs: compiled once, run on the tests of a problem one at a time (report §2.2.2).

In: the code block of a completion and the tests of its problem. Out: a CodeVerdict. Expected outputs stay with this
process; only a special checker gets to see them, in a box in which no solution ever runs.
"""

import contextlib
import dataclasses
import secrets
import types

from magistral_jax.records import MagistralError, Verdict
from magistral_jax.verify.code_compare import Comparison, first_difference
from magistral_jax.verify.code_compile import CompileError
from magistral_jax.verify.code_folders import claimed_folder
from magistral_jax.verify.code_run import GraderBoxes
from magistral_jax.verify.code_tests import CodeTest, CodeTests, Language, Program, language_of
from magistral_jax.verify.code_toolchain import prepare_toolchain
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.format import CodeBlock
from magistral_jax.verify.sandbox.box import BoxError
from magistral_jax.verify.sandbox.execution import Execution, Limits, Status
from magistral_jax.verify.sandbox.mechanism import Mechanism

_SOLUTIONS_PER_BOX = 500
_LARGEST_OUTPUT = 16 * 2**20
_OUTPUT_HEADROOM = 64 * 2**10
_CHECKER_MEMORY_MIB = 1024
_TESTLIB_FAIL = 3  # exit code by which testlib's checkers say that they themselves are wrong


_WARM_UP = {
    "python": "print(input())  # NONCE\n",
    "cpp": "#include <bits/stdc++.h>\nint main() { int x; std::cin >> x; std::cout << x; }  // NONCE\n",
}
_WARM_UP_LIMITS = (10.0, 60.0, 300)  # CPU seconds, wall seconds, MiB


@dataclasses.dataclass(frozen=True)
class CodeVerdict:
    """What became of a solution."""

    verdict: Verdict
    path: str
    """Which rule decided: `tests`, `compile_error`, or the first test that failed and why."""
    passed: int
    """Tests passed; without `partial`, those before the first failure."""
    total: int
    """Tests to be passed."""
    detail: str = ""
    """Words of the compiler or the end of the standard error of the program, for people."""
    failed: CodeTest | None = dataclasses.field(default=None, compare=False)
    """The first test that failed."""
    printed: bytes = dataclasses.field(default=b"", compare=False)
    """What the program wrote in it."""


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why a test was not passed."""

    verdict: Verdict
    reason: str
    detail: str = ""


class _CheckerFault(Exception):
    """A special checker does not work; that says nothing about the solution."""


class CodeGrader:
    """Grades one solution after another. A context manager: boxes and folders end with it."""

    def __init__(self, mechanism: Mechanism, config: CodeConfig) -> None:
        """Find the compiler and precompile the standard header, which takes seconds once on each machine.

        Args:
          mechanism: What confines compiler, solutions and checkers.
          config: Limits.

        Raises:
          MagistralError: There is no compiler that can be used.
        """
        self._mechanism = mechanism
        self._config = config
        prepare_toolchain(config.compiler)
        self._resources = contextlib.ExitStack()
        self._boxes: GraderBoxes | None = None
        self._num_graded = 0
        self._nonce = secrets.token_hex(16)

    def __enter__(self) -> "CodeGrader":
        """Start the boxes, and see that right programs are accepted on this machine.

        Raises:
          MagistralError: One is not; the sentence says what became of it.
        """
        self._folder = self._resources.enter_context(claimed_folder())
        self._resources.callback(self._close_boxes)
        try:
            self._warm_up()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self._resources.__exit__(kind, error, traceback)

    def grade(self, block: CodeBlock, tests: CodeTests) -> CodeVerdict:
        """Run a solution on tests, up to the first that fails, or on all with `partial`.

        What fails in a box rather than in the solution is tried once more in fresh boxes, and then `SANDBOX_ERROR`.
        """
        total = len(tests.tests)
        language = language_of(block.language)
        if language is None or any(test.language not in (None, language) for test in tests.tests):
            return CodeVerdict(Verdict.UNPARSABLE, f"language:{block.language[:20]}", 0, total)
        error = None
        for _ in range(2):
            try:
                return self._grade(Program(language, block.source), tests)
            except CompileError as refusal:
                return CodeVerdict(Verdict.COMPILE_ERROR, refusal.path, 0, total, refusal.message)
            except _CheckerFault as fault:
                return CodeVerdict(Verdict.SANDBOX_ERROR, "checker", 0, total, str(fault))
            except BoxError as failure:
                error = failure
                self._close_boxes()
        return CodeVerdict(Verdict.SANDBOX_ERROR, "box", 0, total, str(error))

    def _warm_up(self) -> None:
        test = CodeTest(1, b"42\n", b"42\n")
        tests = CodeTests((test,), Comparison(), None, *_WARM_UP_LIMITS)
        for language, source in _WARM_UP.items():
            # A number of our own, so that the compiler has something to do.
            found = self.grade(CodeBlock(language, source.replace("NONCE", self._nonce)), tests)
            if found.verdict is not Verdict.CORRECT:
                what = f"{found.verdict.value}, {found.path} {found.detail}".strip()
                raise MagistralError(f"code verification does not work here: a right {language} program got {what}")

    def _grade(self, solution: Program, tests: CodeTests) -> CodeVerdict:
        boxes = self._ready_boxes()
        passed, first = 0, None
        for test in tests.tests:
            failure, printed = self._run_test(boxes, solution, test, tests)
            if failure is None:
                passed += 1
                continue
            first = first or (test, failure, printed)
            if not self._config.partial:
                break
        if first is None:
            return CodeVerdict(Verdict.CORRECT, "tests", passed, len(tests.tests))
        test, failure, printed = first
        path = f"test {test.number}: {failure.reason}"
        return CodeVerdict(failure.verdict, path, passed, len(tests.tests), failure.detail, test, printed)

    def _run_test(
        self, boxes: GraderBoxes, solution: Program, test: CodeTest, tests: CodeTests
    ) -> tuple[_Failure | None, bytes]:
        """Why a test was not passed, if so, and what the program wrote in it."""
        limits = _limits(test, tests)
        if test.code:
            program, companion = _with_test(solution, test, self._nonce)
            done = boxes.run(program, b"", limits, companion=companion)
        else:
            done = boxes.run(solution, test.input, limits)
        failure = None
        if done.status is not Status.OK:
            failure = _Failure(_VERDICTS[done.status], _reason(done), done.stderr.decode("utf-8", "replace"))
        elif test.code:
            if self._nonce.encode() not in done.stdout:
                failure = _Failure(Verdict.WRONG, "ended before its test did")
        elif tests.checker is not None:
            failure = _ask_checker(boxes, tests.checker, test, done.stdout, limits)
        elif (difference := first_difference(done.stdout, test.output, tests.comparison)) is not None:
            failure = _Failure(Verdict.WRONG, difference)
        return failure, done.stdout

    def _ready_boxes(self) -> GraderBoxes:
        """Boxes to grade one solution in; replaced now and then, as nothing is meant to live for ever."""
        self._num_graded += 1
        if self._num_graded % _SOLUTIONS_PER_BOX == 0:
            self._close_boxes()
        if self._boxes is None:
            self._boxes = GraderBoxes(self._mechanism, self._config, folder=self._folder)
        return self._boxes

    def _close_boxes(self) -> None:
        if self._boxes is not None:
            self._boxes.close()
            self._boxes = None


def _limits(test: CodeTest, tests: CodeTests) -> Limits:
    """Limits of a test. Its output may be some times as long as expected; a flood is cut off early."""
    expected = len(test.output)
    return Limits(
        cpu_seconds=tests.cpu_seconds,
        wall_seconds=tests.wall_seconds,
        memory_mib=tests.memory_mib,
        output_bytes=max(min(4 * expected, _LARGEST_OUTPUT), expected) + _OUTPUT_HEADROOM,
    )


_VERDICTS = {
    Status.RUNTIME_ERROR: Verdict.RUNTIME_ERROR,
    Status.TIMEOUT: Verdict.TIMEOUT,
    Status.MEMORY_LIMIT: Verdict.MEMORY_LIMIT,
    Status.OUTPUT_LIMIT: Verdict.OUTPUT_LIMIT,
}


def _reason(done: Execution) -> str:
    if done.status is not Status.RUNTIME_ERROR:
        return done.status.value
    if done.exit_code >= 0:
        return f"exit code {done.exit_code}"
    return f"signal {-done.exit_code}"


def _with_test(solution: Program, test: CodeTest, nonce: str) -> tuple[Program, str]:
    """A solution with the test's code behind it, and the companion unit of a C++ program.

    When the test has run to its end, a word is printed that the solution does not know, since it must not pass by
    leaving early. It is proof against that and no more: whoever reads the memory of the process finds the word.
    """
    if solution.language is Language.PYTHON:
        ending = f"__import__('os').write(1, b'\\n{nonce}\\n')"
        return dataclasses.replace(solution, source=f"{solution.source}\n{test.code}\n{ending}\n"), ""
    # The assertions hold even if the solution has switched them off.
    source = f"{solution.source}\n#undef NDEBUG\n#include <cassert>\n{test.code}\n"
    return dataclasses.replace(solution, source=source), _COMPANION.replace("NONCE", nonce)


_COMPANION = """
extern "C" long write(int, const void *, unsigned long);
extern "C" int __real_main(int, char **);
extern "C" int __wrap_main(int count, char **words) {
    int code = __real_main(count, words);
    const char word[] = "\\nNONCE\\n";
    if (code == 0) write(1, word, sizeof word - 1);
    return code;
}
"""


def _ask_checker(
    boxes: GraderBoxes, checker: Program, test: CodeTest, printed: bytes, limits: Limits
) -> _Failure | None:
    """The verdict of a special checker, which rejects by any exit code other than 0 and testlib's own for a fault."""
    files = {"input": test.input, "output": printed, "answer": test.output}
    limits = dataclasses.replace(limits, memory_mib=_CHECKER_MEMORY_MIB, output_bytes=_LARGEST_OUTPUT)
    try:
        done = boxes.check(checker, files, limits)
    except CompileError as refusal:
        raise _CheckerFault(f"the checker does not compile: {refusal.message}") from None
    words = done.stderr.decode("utf-8", "replace")
    if done.status is Status.OK:
        return None
    if done.status is Status.RUNTIME_ERROR and done.exit_code != _TESTLIB_FAIL:
        return _Failure(Verdict.WRONG, "rejected by the checker", words)
    raise _CheckerFault(f"the checker fails on test {test.number}: {_reason(done)} {words}")
