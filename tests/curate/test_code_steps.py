"""The judgement on a code problem, its solutions played by Python functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from magistral_jax.curate.code_problems import CodeProblem, read_problem
from magistral_jax.curate.code_steps import Judged, for_languages, judge
from magistral_jax.curate.config import CurateConfig
from magistral_jax.records import Problem
from magistral_jax.verify.config import CodeConfig

SOLVERS: dict[str, Callable[[list[int]], object]] = {
    "sum": sum,
    "loop": lambda values: sum(values[1:], values[0]),
    "max": max,
    "broken": lambda values: None,
}
INPUTS = ["1 2 3", "4 5", "7", "1 1 1 1", "9 9", "2 8 5"]


def make(names: list[str], *, wrong: tuple[int, ...] = (), **columns: Any) -> CodeProblem:
    outputs = [sum(map(int, text.split())) + 100 * (i in wrong) for i, text in enumerate(INPUTS)]
    tests = [{"input": text, "output": str(output)} for text, output in zip(INPUTS, outputs, strict=True)]
    statement = columns.pop("statement", "Add the numbers.")
    problem = Problem("p", statement, "", "code", {"tests": tests, "solutions": names, "level": 4, **columns})
    read = read_problem(problem, CodeConfig(), max_solutions=9)
    assert isinstance(read, CodeProblem)
    return read


def run(problem: CodeProblem, **settings: Any) -> Judged:
    def execute(solution, given):
        found = [SOLVERS[solution.source]([int(token) for token in text.split()]) for text in given]
        return [None if value is None else str(value) for value in found]

    config = dataclasses.replace(CurateConfig(min_tests=3, new_tests=0), **settings)
    return judge(problem, execute, config, seed=0)


def test_wrong_outputs_are_repaired_and_wrong_solutions_dropped():
    judged = run(make(["sum", "loop", "max", "broken"], wrong=(1, 4)))
    assert judged.reason == ""
    assert [test["output"] for test in judged.tests] == ["6", "9", "7", "4", "18", "15"]
    assert [solution["source"] for solution in judged.solutions] == ["sum", "loop"]
    assert judged.counts == {
        "tests_kept": 4,
        "tests_repaired": 2,
        "tests_dropped": 0,
        "solutions_dropped": 2,
        "tests_new": 0,
    }


def test_new_tests_are_made_by_two_solutions_and_not_by_one():
    judged = run(make(["sum", "loop"]), new_tests=8)
    new = judged.tests[6:]
    assert len(new) == judged.counts["tests_new"] > 4
    assert all(int(test["output"]) == sum(map(int, test["input"].split())) for test in new)
    assert run(make(["sum"]), new_tests=8).counts["tests_new"] == 0
    assert len(run(make(["sum", "loop"]), new_tests=8, max_tests=7).tests) == 7


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (make(["broken"]), "no right solution"),
        (make(["sum"], wrong=(0, 1)), ""),
        (make(["sum"], wrong=(0, 1, 2)), ""),
        (make(["sum"], wrong=(0, 1, 2, 3)), "no right solution"),
        (make(["sum"], statement="If there are several answers, print any of them."), "several answers"),
        (make(["sum"], statement="If there are several answers, print any.", checker="tokens"), ""),
        (make(["sum"], checker={"language": "python", "source": "pass"}), "checker program"),
    ],
)
def test_which_problems_are_removed(problem: CodeProblem, reason: str):
    assert run(problem).reason == reason


def test_too_few_tests():
    judged = run(make(["sum"], wrong=(0, 1)), min_tests=5)
    assert (judged.reason, judged.detail) == ("too few tests", "4")


def test_a_statement_asks_for_each_language():
    problem = make(["sum", "loop"], wrong=(1,))
    python, cpp = for_languages(problem.problem, run(problem))
    assert (python.id, cpp.id) == ("p/python", "p/cpp")
    assert python.statement == "Add the numbers.\n\nWrite the program in Python."
    assert cpp.statement == "Add the numbers.\n\nWrite the program in C++."
    assert python.extra["tests"] == cpp.extra["tests"]
    assert (cpp.extra["language"], cpp.extra["level"], cpp.extra["tests_repaired"]) == ("cpp", 4, 1)


def test_calls_are_for_python_only():
    columns = {"test_list": ["assert f(1) == 2"], "solution": "x"}
    problem = Problem("p", "Add.", "", "code", columns)
    judged = Judged("p", tests=({"code": "assert f(1) == 2", "language": "python"},))
    assert [version.id for version in for_languages(problem, judged)] == ["p/python"]
