"""Code problems with their known solutions and tests; in: a Problem with the columns of some data set, out: one form.

Tests are inputs and outputs, or calls of a Python function with the value that is expected: rows of `tests`, a function
`check(candidate)` in `test`, or assertions in `test_list`. A call is run as a program that prints the value, so that
both kinds go the same way.
"""

import ast
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from magistral_jax.data.overlap import Removal
from magistral_jax.records import MagistralError, Problem
from magistral_jax.verify.code_compare import first_difference
from magistral_jax.verify.code_tests import CodeTests, Language, Program, language_of, select_tests
from magistral_jax.verify.config import CodeConfig

PRELUDE = """\
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import itemgetter, or_, xor
from string import ascii_lowercase, ascii_uppercase
from typing import *

inf = float("inf")
"""
"""What solutions of the class `Solution` expect to be imported."""

_MARK = "@@value@@"
_LARGEST_VALUE = 100_000  # characters of a value that is compared as a value
_LANGUAGE_NUMBERS = {1: Language.PYTHON, 2: Language.CPP, 3: Language.PYTHON}  # of the CodeContests data set


@dataclasses.dataclass(frozen=True)
class Case:
    """One test: an input and its output, or a call and the value that it returns, both as source."""

    given: str
    expected: str


@dataclasses.dataclass(frozen=True)
class CodeProblem:
    """A problem, what solves it, and what the solutions are tried on."""

    problem: Problem
    solutions: tuple[Program, ...]
    cases: tuple[Case, ...]
    is_call: bool
    """Whether the cases are calls of a Python function."""
    entry: str
    """What `candidate` stands for in calls, as source; empty where the function has its own name."""
    limits: CodeTests
    """Comparison, checker and limits of the problem; its tests are not used."""

    def agree(self, first: str, second: str) -> bool:
        """Whether two outputs are one answer."""
        if not self.is_call:
            return first_difference(_bytes(first), _bytes(second), self.limits.comparison) is None
        return first == second or _value(first) == _value(second) is not None

    def program(self, solution: Program, given: str) -> tuple[Program, bytes]:
        """The program to run and its standard input."""
        if not self.is_call:
            return solution, _bytes(given)
        alias = f"candidate = {self.entry}\n" if self.entry else ""
        source = f"{solution.source}\n{alias}print({_MARK!r} + repr({given}))\n"
        return dataclasses.replace(solution, source=source), b""

    def output(self, printed: bytes) -> str | None:
        """The answer in what a program wrote, None where there is none."""
        text = printed.decode("utf-8", "replace")
        if not self.is_call:
            return text
        _, mark, value = text.rpartition(_MARK)
        return value.strip() if mark else None

    def test(self, case: Case) -> dict[str, str]:
        """A case as an entry of the column `tests`."""
        if not self.is_call:
            return {"input": case.given, "output": case.expected}
        alias = f"candidate = {self.entry}\n" if self.entry else ""
        return {"code": f"{alias}assert {case.given} == {case.expected}\n", "language": "python"}


def read_problem(problem: Problem, config: CodeConfig, max_solutions: int) -> CodeProblem | Removal:
    """A code problem from its columns, or why it cannot be used."""
    if problem.kind != "code":
        return Removal(problem.id, "not code", problem.kind)
    try:
        solutions = read_solutions(problem.extra, problem.statement)
        entry, cases = _read_calls(problem.extra)
        is_call = bool(cases)
        limits = select_tests(_with_tests(problem, is_call), dataclasses.replace(config, num_tests=0), seed=0)
    except MagistralError as error:
        return Removal(problem.id, "tests cannot be read", str(error))
    if not is_call:
        cases = [Case(t.input.decode("utf-8", "replace"), t.output.decode("utf-8", "replace")) for t in limits.tests]
    else:
        solutions = [s for s in solutions if s.language is Language.PYTHON]
    if not solutions:
        return Removal(problem.id, "no solution")
    unique = tuple(dict.fromkeys(cases))
    return CodeProblem(problem, tuple(dict.fromkeys(solutions))[:max_solutions], unique, is_call, entry, limits)


# ---- solutions ------------------------------------------------------------------------------------------------------


def read_solutions(columns: Mapping[str, Any], statement: str = "") -> list[Program]:
    """Programs of `solutions` or `solution`: sources in Python, {language, source} or {language, solution}, or lists.

    Languages that are not verified are passed over.

    Args:
      columns: Of the row. MBPP has its one solution in `code`; HumanEval's `canonical_solution` goes on where the
        statement, which is source, ends.
      statement: The problem's.
    """
    names = ("solutions", "solution", "code", "canonical_solution")
    name = next((name for name in names if columns.get(name) is not None), names[0])
    found = columns.get(name)
    if name == "canonical_solution":
        found = f"{statement}{found}"
    if isinstance(found, str) and found.lstrip().startswith(("[", "{")):
        try:
            found = json.loads(found)
        except ValueError:
            found = [found]
    if isinstance(found, Mapping) and isinstance(found.get("language"), Sequence | int) and "solution" in found:
        tags, sources = found["language"], found["solution"]
        if isinstance(tags, list) and isinstance(sources, list):
            found = [{"language": tag, "source": source} for tag, source in zip(tags, sources, strict=False)]
    if isinstance(found, str | Mapping):
        found = [found]
    programs = [_read_program(entry) for entry in found or []]
    return [program for program in programs if program is not None and program.source.strip()]


def _read_program(entry: Any) -> Program | None:
    if isinstance(entry, str):
        source, language = entry, Language.PYTHON
    elif isinstance(entry, Mapping):
        source, tag = entry.get("source", entry.get("solution")), entry.get("language", "python")
        language = _LANGUAGE_NUMBERS.get(tag) if isinstance(tag, int) else language_of(str(tag))
    else:
        return None
    if language is None or not isinstance(source, str):
        return None
    if language is Language.PYTHON and "class Solution" in source and not source.startswith(PRELUDE):
        source = PRELUDE + source
    return Program(language, source)


# ---- tests ----------------------------------------------------------------------------------------------------------


def _with_tests(problem: Problem, is_call: bool) -> Problem:
    """A problem that `select_tests` reads the limits of; tests that are calls are read here."""
    if not is_call:
        return problem
    return dataclasses.replace(problem, extra={**problem.extra, "tests": [{"input": "", "output": ""}]})


def _read_calls(columns: Mapping[str, Any]) -> tuple[str, list[Case]]:
    """Entry and calls where the tests are calls; none where they are not."""
    test, listed, rows = columns.get("test"), columns.get("test_list"), columns.get("tests")
    if isinstance(test, str):
        sources = [test]
    elif isinstance(listed, list):
        sources = [str(line) for line in listed]
    elif isinstance(rows, list) and rows and isinstance(rows[0], Mapping) and rows[0].get("code"):
        sources = [str(row.get("code", "")) for row in rows if isinstance(row, Mapping)]
    else:
        return "", []
    entry, cases = str(columns.get("entry_point") or ""), list[Case]()
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise MagistralError(f"a test is not Python: {error}") from None
        entry = _entry(tree) or entry
        cases += [case for node in ast.walk(tree) if (case := _case(node)) is not None]
    if not cases:
        raise MagistralError("no test compares a call with a value")
    return entry, cases


def _entry(tree: ast.Module) -> str:
    """What `check(…)` is called with, or `candidate` is set to."""
    for node in tree.body:
        match node:
            case ast.Expr(ast.Call(ast.Name("check"), [argument])):
                return ast.unparse(argument)
            case ast.Assign([ast.Name("candidate")], value):
                return ast.unparse(value)
    return ""


def _case(node: ast.AST) -> Case | None:
    """The call and the value of `assert call == value`."""
    match node:
        case ast.Assert(ast.Compare(ast.Call() as call, [ast.Eq()], [value])):
            if _value(ast.unparse(value)) is not None:
                return Case(ast.unparse(call), ast.unparse(value))
    return None


def _value(text: str) -> tuple[Any] | None:
    """The value of a literal, in a tuple of its own; None where the text is none, or very long."""
    if len(text) > _LARGEST_VALUE:
        return None
    try:
        return (ast.literal_eval(text),)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
