"""Tests of code problems: the shapes that files have, what is said about broken ones, and a sample that never moves."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.records import MagistralError, Problem
from magistral_jax.verify.code_compare import Comparison
from magistral_jax.verify.code_tests import CodeTest, Language, Program, language_of, select_tests
from magistral_jax.verify.config import CodeConfig

PAIR = {"input": "1 2\n", "output": "3\n"}
LISTS = {"inputs": ["1 2\n", "é"], "outputs": ["3\n", ""]}
TESTS = (CodeTest(1, b"1 2\n", b"3\n"), CodeTest(2, "é".encode(), b""))
ALL = CodeConfig(num_tests=0)


def problem(**columns: Any) -> Problem:
    return Problem("p", "Add two numbers.", "", "code", columns)


@pytest.mark.parametrize(
    "column",
    [
        [PAIR, {"input": "é", "output": "", "testtype": "stdin"}],
        LISTS,
        json.dumps(LISTS),
        json.dumps([PAIR, {"input": "é", "output": ""}]),
    ],
)
def test_shapes_that_files_have(column: Any):
    selected = select_tests(problem(tests=column), ALL, 0)
    assert selected.tests == TESTS
    assert selected.comparison == Comparison("tokens", 1e-6)
    assert selected.checker is None
    assert (selected.cpu_seconds, selected.wall_seconds, selected.memory_mib) == (4.0, 10.0, 300)


def test_tests_that_are_code():
    rows = [{"code": "assert f(1) == 2"}, {"code": "int main() {}", "language": "c++"}]
    assert select_tests(problem(tests=rows), ALL, 0).tests == (
        CodeTest(1, code="assert f(1) == 2", language=Language.PYTHON),
        CodeTest(2, code="int main() {}", language=Language.CPP),
    )


def test_how_output_is_judged():
    def read(**columns: Any):
        selected = select_tests(problem(tests=[PAIR], **columns), ALL, 0)
        return selected.comparison, selected.checker

    assert read(checker="lines") == (Comparison("lines"), None)
    assert read(tolerance=1e-3) == (Comparison("float", 1e-3), None)
    assert read(checker="tokens", tolerance=0) == (Comparison("tokens", 0.0), None)
    assert read(checker=None, tolerance=float("nan")) == (Comparison(), None)
    source = "int main() {}"
    assert read(checker={"language": "C++", "source": source}) == (Comparison(), Program(Language.CPP, source))


def test_the_limits_of_a_problem_win():
    tight = select_tests(problem(tests=[PAIR], cpu_seconds=1, memory_mib=64), ALL, 0)
    assert (tight.cpu_seconds, tight.wall_seconds, tight.memory_mib) == (1.0, 10.0, 64)
    wide = select_tests(problem(tests=[PAIR], cpu_seconds=8, memory_mib=1024.0), ALL, 0)
    assert (wide.cpu_seconds, wide.wall_seconds, wide.memory_mib) == (8.0, 20.0, 1024)


def test_languages():
    assert {language_of(tag) for tag in ("python", "py", "Python3", "pypy")} == {Language.PYTHON}
    assert {language_of(tag) for tag in ("cpp", "c++", "CC", "cxx", "cpp20")} == {Language.CPP}
    assert {language_of(tag) for tag in ("", "java", "text", "c", "output")} == {None}


# --- the sample ------------------------------------------------------------------------------------------------------


def numbers(num: int, seed: int, *, total: int = 100, id_: str = "p") -> list[int]:
    rows = [{"input": str(i), "output": str(i)} for i in range(total)]
    selected = select_tests(Problem(id_, "s", "", "code", {"tests": rows}), CodeConfig(num_tests=num), seed)
    assert all(test.input == b"%d" % (test.number - 1) for test in selected.tests)
    return [test.number for test in selected.tests]


def test_a_sample_is_the_same_on_every_machine():
    assert numbers(5, 0) == [34, 47, 58, 59, 66]
    assert numbers(5, 1) != numbers(5, 0)
    assert numbers(5, 0, id_="q") != numbers(5, 0)
    assert numbers(20, 0, total=7) == list(range(1, 8))
    assert numbers(0, 0) == list(range(1, 101))


@given(st.integers(0, 2**63), st.integers(1, 30), st.text())
@settings(deadline=None)
def test_a_sample_is_a_sample(seed: int, num: int, id_: str):
    chosen = numbers(num, seed, total=20, id_=id_)
    assert chosen == sorted(set(chosen)) == numbers(num, seed, total=20, id_=id_)
    assert len(chosen) == min(num, 20)


def test_every_test_is_sampled_about_as_often():
    counts = [0] * 10
    for seed in range(400):
        for number in numbers(3, seed, total=10):
            counts[number - 1] += 1
    assert all(85 <= count <= 160 for count in counts), counts  # 120 expected


# --- broken rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({}, "a code problem needs a column tests; expected a list of {input, output}"),
        ({"tests": None}, "a code problem needs a column tests; expected a list of {input, output}"),
        ({"tests": []}, "tests is []; expected a list of {input, output}, not empty"),
        ({"tests": 3}, "tests is 3; expected a list of {input, output}, not empty"),
        ({"tests": "[1, "}, "tests is text, but not valid JSON: Expecting value: line 1 column 5 (char 4)"),
        ({"tests": '"text"'}, "tests is 'text'; expected a list of {input, output}, not empty"),
        ({"tests": ["4"]}, "test 1 is '4'; expected {input, output}"),
        ({"tests": [PAIR, {"input": "1"}]}, "output of test 2 is None; expected text"),
        ({"tests": [{"input": [1, 2], "output": "3"}]}, "input of test 1 is [1, 2]; expected text"),
        ({"tests": [{"code": 3}]}, "the source of test 1 is 3; expected a program as text"),
        ({"tests": [{"code": "f", "language": "go"}]}, "the language of test 1 is 'go'; expected python or cpp"),
        ({"tests": {"a": 1, "b": 2}}, "tests has the keys a, b; expected lists inputs and outputs"),
        ({"tests": LISTS | {"outputs": ["3"]}}, "tests has 2 inputs and 1 outputs; expected as many"),
        (
            {"tests": LISTS | {"fn_name": "add"}},
            "tests calls a function (fn_name); expected input and output, or {code} that calls it",
        ),
        (
            {"tests": [PAIR | {"testtype": "functional"}]},
            "test 1 calls a function; expected input and output, or {code} that calls it",
        ),
        (
            {"tests": [PAIR], "checker": "fuzzy"},
            "checker is 'fuzzy'; expected tokens, lines, exact, float or {language, source}",
        ),
        ({"tests": [PAIR], "checker": {"source": "x"}}, "the language of checker is None; expected python or cpp"),
        (
            {"tests": [PAIR], "checker": {"language": "cpp", "source": " "}},
            "the source of checker is ' '; expected a program as text",
        ),
        (
            {"tests": [PAIR], "checker": "lines", "tolerance": 0.1},
            "a tolerance has no effect beside the checker lines; it goes with tokens or float",
        ),
        (
            {"tests": [PAIR], "checker": {"language": "cpp", "source": "x"}, "tolerance": 0.1},
            "a tolerance has no effect beside a checker that is a program",
        ),
        ({"tests": [PAIR], "tolerance": "1e-6"}, "tolerance is '1e-6'; expected a number of at least 0"),
        ({"tests": [PAIR], "tolerance": -1}, "tolerance is -1; expected a number of at least 0"),
        ({"tests": [PAIR], "cpu_seconds": 0}, "cpu_seconds is 0; expected a number of at least 0.001"),
        ({"tests": [PAIR], "memory_mib": True}, "memory_mib is True; expected a number of at least 0.001"),
        ({"tests": [PAIR], "memory_mib": 1e999}, "memory_mib is inf; expected a number of at least 0.001"),
    ],
)
def test_a_broken_row_is_named(columns: dict[str, Any], sentence: str):
    with pytest.raises(MagistralError) as error:
        select_tests(problem(**columns), ALL, 0)
    assert str(error.value) == f"problem 'p': {sentence}"


def test_a_long_value_is_shown_short():
    with pytest.raises(MagistralError, match=r"input of test 1 is list \[0, 1, 2, 3, .{17}…; expected text"):
        select_tests(problem(tests=[{"input": list(range(10**5)), "output": ""}]), ALL, 0)


def test_the_longest_run_counts_every_limit():
    def longest(**columns: Any) -> float:
        return select_tests(problem(**columns), ALL, 0).longest_run(ALL)

    assert longest(tests=[PAIR] * 5) == 30.0 + 5 * 10.0
    assert longest(tests=[{"code": "pass"}] * 5) == 6 * 30.0 + 5 * 10.0  # each one is a program of its own
    checker = {"language": "python", "source": "pass"}
    assert longest(tests=[PAIR] * 5, checker=checker) == 2 * 30.0 + 10 * 10.0
