"""Code problems of several data sets in one form."""

from typing import Any

import pytest

from magistral_jax.curate.code_problems import PRELUDE, Case, CodeProblem, read_problem, read_solutions
from magistral_jax.data.overlap import Removal
from magistral_jax.records import Problem
from magistral_jax.verify.code_tests import Language, Program
from magistral_jax.verify.config import CodeConfig

IO = [{"input": "1\n", "output": "2\n"}, {"input": "2\n", "output": "3\n"}, {"input": "1\n", "output": "2\n"}]


def read(**columns: Any) -> CodeProblem | Removal:
    return read_problem(Problem("p", "Add one.", "", "code", columns), CodeConfig(), max_solutions=2)


def good(**columns: Any) -> CodeProblem:
    problem = read(**columns)
    assert isinstance(problem, CodeProblem)
    return problem


def test_inputs_and_outputs():
    problem = good(tests=IO, solutions=["print(1)", "print(1)", "print(2)", "print(3)"])
    assert problem.cases == (Case("1\n", "2\n"), Case("2\n", "3\n"))  # each once
    assert [solution.source for solution in problem.solutions] == ["print(1)", "print(2)"]
    assert problem.program(problem.solutions[0], "1\n") == (problem.solutions[0], b"1\n")
    assert problem.agree("2 \n", "2")
    assert not problem.agree("2", "3")
    assert problem.test(problem.cases[0]) == {"input": "1\n", "output": "2\n"}


def test_a_tolerance_is_used():
    problem = good(tests=IO, solutions=["x"], tolerance=0.01)
    assert problem.agree("1.001", "1.0")


def test_calls_of_a_method():
    checks = "    assert candidate(x = [1]) == [2]\n    assert candidate(x=[]) is None\n"
    test = f"def check(candidate):\n{checks}\ncheck(Solution().add)"
    problem = good(test=test, solution="class Solution:\n    def add(self, x): return [1 + v for v in x]")
    assert (problem.is_call, problem.entry) == (True, "Solution().add")
    assert problem.cases == (Case("candidate(x=[1])", "[2]"),)
    program, stdin = problem.program(problem.solutions[0], problem.cases[0].given)
    assert stdin == b""
    assert program.source.startswith(PRELUDE)
    printed: list[str] = []
    exec(program.source, {"print": printed.append, "__name__": "__main__"})
    assert problem.output(b"chatter\n" + printed[0].encode() + b"\n") == "[2]"
    assert problem.output(b"nothing of ours") is None
    assert problem.agree("[2]", "[ 2 ]")
    assert not problem.agree("[2]", "[2, 3]")
    code = problem.test(problem.cases[0])["code"]
    assert code == "candidate = Solution().add\nassert candidate(x=[1]) == [2]\n"
    again = good(tests=[{"code": code, "language": "python"}], solutions=[program.source])  # it reads what it wrote
    assert (again.entry, again.cases) == (problem.entry, problem.cases)


def test_calls_by_name():
    problem = good(test_list=["assert add(1) == 2", "assert add(2) == 3"], solution="def add(x): return x + 1")
    assert (problem.entry, problem.cases[1]) == ("", Case("add(2)", "3"))


def test_rows_as_the_known_data_sets_have_them():
    mbpp = good(test_list=["assert add(1) == 2"], code="def add(x): return x + 1", test_setup_code="")
    assert mbpp.solutions == (Program(Language.PYTHON, "def add(x): return x + 1"),)
    test = "METADATA = {}\ndef check(candidate):\n    assert candidate(1) == 2\n"
    columns = {"entry_point": "add", "canonical_solution": "    return x + 1\n", "test": test}
    human_eval = read_problem(Problem("p", "def add(x):\n", "", "code", columns), CodeConfig(), max_solutions=2)
    assert isinstance(human_eval, CodeProblem)
    assert human_eval.solutions[0].source == "def add(x):\n    return x + 1\n"  # the statement is its beginning
    assert (human_eval.entry, human_eval.cases) == ("add", (Case("candidate(1)", "2"),))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"solution": "print(1)"}, [Language.PYTHON]),
        ({"solutions": [{"language": "cpp", "source": "int main() {}"}, "print(1)"]}, [Language.CPP, Language.PYTHON]),
        (
            {"solutions": {"language": [2, 3, 4], "solution": ["int main() {}", "print(1)", "x"]}},
            [Language.CPP, Language.PYTHON],
        ),
        ({"solutions": '["print(1)", "print(2)"]'}, [Language.PYTHON] * 2),
        ({"solutions": [{"language": "rust", "source": "fn main() {}"}, {"language": "cpp"}, 3, " "]}, []),
        ({}, []),
    ],
)
def test_solutions(columns: dict[str, Any], expected: list[Language]):
    assert [program.language for program in read_solutions(columns)] == expected


@pytest.mark.parametrize(
    ("columns", "reason", "detail"),
    [
        ({"tests": IO}, "no solution", ""),
        ({"solutions": ["x"]}, "tests cannot be read", "needs a column tests"),
        ({"solutions": ["x"], "tests": []}, "tests cannot be read", "not empty"),
        ({"solutions": ["x"], "test": "def check(c): ("}, "tests cannot be read", "a test is not Python"),
        ({"solutions": ["x"], "test": "assert same(f(1), 2)"}, "tests cannot be read", "no test compares"),
        ({"solutions": [{"language": "cpp", "source": "x"}], "test_list": ["assert f(1) == 2"]}, "no solution", ""),
    ],
)
def test_what_cannot_be_used_is_named(columns: dict[str, Any], reason: str, detail: str):
    removal = read(**columns)
    assert isinstance(removal, Removal)
    assert removal.reason == reason
    assert detail in removal.detail


def test_a_deep_value_is_no_answer():
    problem = good(test_list=["assert f(1) == [2]"], solution="x")
    assert not problem.agree("[" * 90_000, "[2]")
    assert not problem.agree("<object>", "[2]")
    assert isinstance(problem.solutions[0], Program)
