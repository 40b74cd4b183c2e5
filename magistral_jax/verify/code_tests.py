"""The tests of a code problem; in: a Problem and its columns, out: the tests that its completions are run on.

Columns: `tests`, and where wanted `checker`, `tolerance`, `cpu_seconds` and `memory_mib`.
"""

import dataclasses
import enum
import hashlib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_jax.records import MagistralError, Problem
from magistral_jax.verify.code_compare import Comparison, ComparisonMode
from magistral_jax.verify.config import CodeConfig


class Language(enum.Enum):
    """A language that programs are verified in."""

    PYTHON = "python"
    CPP = "cpp"


_TAGS = {
    **dict.fromkeys(("python", "py", "python3", "py3", "pypy", "pypy3"), Language.PYTHON),
    **dict.fromkeys(("cpp", "c++", "cc", "cxx", "cpp17", "cpp20", "c++17", "c++20"), Language.CPP),
}


def language_of(tag: str) -> Language | None:
    """Language of a fence tag or of a column, None where there is no verifier for it."""
    return _TAGS.get(tag.lower())


@dataclasses.dataclass(frozen=True)
class CodeTest:
    """One test: an input and its output, or code that is appended to the solution and then has to end well.

    Appended code holds the expected values, so unlike `output` they do enter the sandbox: a solution that looks for
    them there, or returns an object that is equal to everything, passes. One that ends the process early does not.
    """

    number: int
    """Place among all tests of the problem, from 1."""
    input: bytes = b""
    output: bytes = b""
    code: str = ""
    language: Language | None = None
    """Of `code`; None for a test by input and output, which any language may pass."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Source code in a language."""

    language: Language
    source: str


@dataclasses.dataclass(frozen=True)
class CodeTests:
    """What completions of a problem are run on, and how their output is judged."""

    tests: tuple[CodeTest, ...]
    comparison: Comparison
    checker: Program | None
    """Special checker: gets the files input, output and answer as arguments and exits with 0 to accept."""
    cpu_seconds: float
    wall_seconds: float
    memory_mib: int

    def longest_run(self, config: CodeConfig) -> float:
        """Seconds that compiling and running may take in all, before some limit ends it."""
        programs = 1 + sum(bool(test.code) for test in self.tests)
        runs = len(self.tests)
        if self.checker is not None:
            programs, runs = programs + 1, 2 * runs
        return programs * config.compile_wall_seconds + runs * self.wall_seconds


def select_tests(problem: Problem, config: CodeConfig, seed: int) -> CodeTests:
    """The tests of a problem, or a sample of them: a function of its arguments, on every machine.

    Args:
      problem: Its column `tests` is a list of {"input", "output"} or {"code", "language"}, or {"inputs": […],
        "outputs": […]}, or the JSON text of either. `checker` is a mode of `Comparison` or a program {"language",
        "source"}; `tolerance` alone means the mode `float`. `cpu_seconds` and `memory_mib` are the problem's own limits
        and win over those of `config`, in both directions.
      config: How many tests are taken, and the limits.
      seed: Picks the sample; the same for all completions of a group.

    Raises:
      MagistralError: A column is missing or malformed; the sentence names the problem and the column.
    """
    columns = {name: value for name, value in problem.extra.items() if not _is_missing(value)}
    try:
        tests = _read_tests(columns.get("tests"))
        comparison, checker = _read_checker(columns.get("checker"), columns.get("tolerance"))
        cpu_seconds = _read_limit(columns, "cpu_seconds") or config.cpu_seconds
        memory_mib = _read_limit(columns, "memory_mib") or config.memory_mib
    except _Malformed as error:
        raise MagistralError(f"problem {problem.id!r}: {error}") from None
    return CodeTests(
        tests=_sample(tests, config.num_tests, f"{seed}:{problem.id}"),
        comparison=comparison,
        checker=checker,
        cpu_seconds=cpu_seconds,
        wall_seconds=config.wall_seconds * max(1.0, cpu_seconds / config.cpu_seconds),
        memory_mib=math.ceil(memory_mib),
    )


def _sample(tests: Sequence[CodeTest], num: int, key: str) -> tuple[CodeTest, ...]:
    """`num` of the tests in their order, 0 for all. Ranked by a hash: `random` may change with Python's version."""

    def rank(test: CodeTest) -> bytes:
        return hashlib.sha256(f"{key}:{test.number}".encode("utf-8", "surrogatepass")).digest()

    chosen = sorted(tests, key=rank)[:num] if num else tests
    return tuple(sorted(chosen, key=lambda test: test.number))


class _Malformed(Exception):
    """A column that cannot be read; the message says why."""


def _is_missing(value: Any) -> bool:
    """Parquet fills a column that a row does not have with None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _read_tests(column: Any) -> list[CodeTest]:
    if column is None:
        raise _Malformed("a code problem needs a column tests; expected a list of {input, output}")
    if isinstance(column, str):
        try:
            column = json.loads(column)
        except ValueError as error:
            raise _Malformed(f"tests is text, but not valid JSON: {error}") from None
    if isinstance(column, Mapping):
        column = _rows_of_lists(column)
    if not isinstance(column, Sequence) or isinstance(column, str) or not column:
        raise _Malformed(f"tests is {_shown(column)}; expected a list of {{input, output}}, not empty")
    return [_read_test(row, number) for number, row in enumerate(column, 1)]


def _rows_of_lists(column: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"inputs": […], "outputs": […]} as rows."""
    if column.get("fn_name"):
        raise _Malformed("tests calls a function (fn_name); expected input and output, or {code} that calls it")
    inputs, outputs = column.get("inputs"), column.get("outputs")
    if not (isinstance(inputs, list) and isinstance(outputs, list)):
        raise _Malformed(f"tests has the keys {', '.join(column)}; expected lists inputs and outputs")
    if len(inputs) != len(outputs):
        raise _Malformed(f"tests has {len(inputs)} inputs and {len(outputs)} outputs; expected as many")
    return [{"input": input_, "output": output} for input_, output in zip(inputs, outputs, strict=True)]


def _read_test(row: Any, number: int) -> CodeTest:
    if not isinstance(row, Mapping):
        raise _Malformed(f"test {number} is {_shown(row)}; expected {{input, output}}")
    if row.get("testtype") == "functional":
        raise _Malformed(f"test {number} calls a function; expected input and output, or {{code}} that calls it")
    if not _is_missing(row.get("code")):
        program = _read_program({"language": row.get("language") or "python", "source": row["code"]}, f"test {number}")
        return CodeTest(number, code=program.source, language=program.language)
    return CodeTest(number, _read_text(row, "input", number), _read_text(row, "output", number))


def _read_text(row: Mapping[str, Any], name: str, number: int) -> bytes:
    text = row.get(name)
    if not isinstance(text, str):
        raise _Malformed(f"{name} of test {number} is {_shown(text)}; expected text")
    return text.encode("utf-8", "surrogatepass")


def _read_checker(checker: Any, tolerance: Any) -> tuple[Comparison, Program | None]:
    modes = typing.get_args(ComparisonMode)
    if isinstance(checker, Mapping):
        if tolerance is not None:
            raise _Malformed("a tolerance has no effect beside a checker that is a program")
        return Comparison(), _read_program(checker, "checker")
    if checker is None:
        checker = "tokens" if tolerance is None else "float"
    if checker not in modes:
        raise _Malformed(f"checker is {_shown(checker)}; expected {', '.join(modes)} or {{language, source}}")
    if tolerance is None:
        return Comparison(checker), None
    if checker not in ("tokens", "float"):
        raise _Malformed(f"a tolerance has no effect beside the checker {checker}; it goes with tokens or float")
    return Comparison(checker, _read_number(tolerance, "tolerance", at_least=0.0)), None


def _read_program(row: Mapping[str, Any], where: str) -> Program:
    tag, source = row.get("language"), row.get("source")
    language = language_of(tag) if isinstance(tag, str) else None
    if language is None:
        raise _Malformed(f"the language of {where} is {_shown(tag)}; expected python or cpp")
    if not isinstance(source, str) or not source.strip():
        raise _Malformed(f"the source of {where} is {_shown(source)}; expected a program as text")
    return Program(language, source)


def _read_limit(columns: Mapping[str, Any], name: str) -> float | None:
    return _read_number(columns[name], name, at_least=1e-3) if name in columns else None


def _read_number(value: Any, name: str, *, at_least: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and at_least <= value < math.inf):
        raise _Malformed(f"{name} is {_shown(value)}; expected a number of at least {at_least:g}")
    return float(value)


def _shown(value: Any) -> str:
    """A value for an error sentence: on one line, and short."""
    text = repr(value)
    return text if len(text) <= 40 else f"{type(value).__name__} {text[:30]}…"
