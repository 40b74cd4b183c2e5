"""Cold-start traces: thorough ones are true line by line, hasty ones guess, and files are read or refused."""

import pathlib
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.data.sources import load_problems
from magistral_jax.data.traces import Trace, make_traces, read_traces, thorough_thoughts
from magistral_jax.records import Problem
from magistral_jax.verify.format import Sections, last_boxed, split_completion
from magistral_jax.verify.language import classify


def chain(expression: str, answer: str = "0"):
    return Problem("c", f"{expression} =", answer, extra={"metadata": {"expression": expression}})


@pytest.mark.parametrize(
    ("expression", "thoughts", "result"),
    [
        ("4 - 1 + 7 + 7 - 7", "4-1=3\n3+7=10\n10+7=17\n17-7=10", 10),
        ("2 - 9 - 1", "2-9=-7\n-7-1=-8", -8),
        ("-4 - -3", "-4+3=-1", -1),
        ("-4 + -3", "-4-3=-7", -7),
        ("12", "12", 12),
    ],
)
def test_thorough_thoughts(expression: str, thoughts: str, result: int):
    assert thorough_thoughts(chain(expression)) == (thoughts, result)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_thorough_traces_are_true(seed: int):
    problems = load_problems("reasoning-gym:chain_sum?allow_negation=true&max_digits=3", 5, seed)
    for trace in make_traces(problems, np.random.default_rng(seed), thorough_share=1.0):
        match = re.fullmatch(r"<think>(.+)</think>\\boxed\{(-?\d+)\}", trace.completion, re.DOTALL)
        assert match is not None
        assert match[2] == trace.problem.answer
        lines = match[1].splitlines()
        for line in lines:
            left, right = line.split("=")
            numbers = re.fullmatch(r"(-?\d+)([+-]\d+)", left)
            assert numbers is not None
            assert int(numbers[1]) + int(numbers[2]) == int(right)
        assert lines[-1].endswith(f"={trace.problem.answer}")


def test_hasty_traces_guess_near_the_result_and_are_right_at_the_given_rate():
    problem = chain("4 - 1 + 7", "10")
    traces = make_traces([problem] * 2000, np.random.default_rng(0), thorough_share=0.0, lucky_share=0.25)
    guesses = []
    for trace in traces:
        match = re.fullmatch(r"<think>looks like (-?\d+)</think>\\boxed\{(-?\d+)\}", trace.completion)
        assert match is not None
        assert match[1] == match[2]
        guesses.append(int(match[2]))
    assert {abs(guess - 10) for guess in guesses} == set(range(10))
    assert 0.21 < np.mean(np.equal(guesses, 10)) < 0.29  # four standard errors


def test_the_mixture_and_determinism():
    problems = load_problems("reasoning-gym:chain_sum", 1000, 0)
    first, second = (make_traces(problems, np.random.default_rng(3), thorough_share=0.4) for _ in range(2))
    assert first == second
    share = np.mean(["looks like" not in trace.completion for trace in first])
    assert 0.34 < share < 0.46
    assert [trace.problem for trace in first] == problems


def test_the_tags_are_those_given():
    (trace,) = make_traces(
        [chain("1 + 1")], np.random.default_rng(0), thorough_share=1.0, think_tags=("[THINK]", "[/THINK]")
    )
    assert trace.completion == "[THINK]1+1=2[/THINK]\\boxed{2}"


@pytest.mark.parametrize("expression", ["", "2 * 3", "2 + x", "(1 + 2)"])
def test_problems_that_are_no_chain_of_sums_are_named(expression: str, refuses: Any):
    with refuses(
        "problem c: traces are generated for reasoning-gym:chain_sum and templated:sums only; expected an expression "
        f"of sums in its metadata, found {expression!r} (set sft.traces to a file for other problems)"
    ):
        make_traces([chain(expression)], np.random.default_rng(0), thorough_share=1.0)


def test_problems_of_a_file_are_no_chain_of_sums(refuses: Any):
    with refuses("problem f: traces are generated for reasoning-gym:chain_sum and templated:sums only", "found ''"):
        make_traces([Problem("f", "1+1", "2")], np.random.default_rng(0), thorough_share=1.0)


def test_templated_traces_are_in_the_language_of_the_problem_or_in_english_at_the_given_rate():
    problems = load_problems("templated:sums?language=de,zh", 600, 0)
    traces = make_traces(problems, np.random.default_rng(0), thorough_share=0.5, lucky_share=0.2, native_share=0.7)
    num_native = num_right = 0
    for problem, trace in zip(problems, traces, strict=True):
        sections = split_completion(trace.completion, "<think>", "</think>")
        assert isinstance(sections, Sections)
        language = classify(sections.thoughts)
        assert language == classify(sections.answer)
        assert language in (problem.extra["language"], "en")
        num_native += language == problem.extra["language"]
        num_right += last_boxed(sections.answer) == problem.answer
    assert 0.65 < num_native / 600 < 0.75
    assert 0.54 < num_right / 600 < 0.66  # half are thorough, and of the others one in five is lucky


# --- files -----------------------------------------------------------------------------------------------------------


def test_traces_of_a_file(tmp_path: pathlib.Path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"problem": "1+1", "completion": "<think>two</think>2"}\n{"question": "2", "completion": "c", "answer": 2}\n'
    )
    assert read_traces(path) == [
        Trace(Problem("t:1", "1+1", ""), "<think>two</think>2"),
        Trace(Problem("t:2", "2", "2"), "c"),
    ]


@pytest.mark.parametrize("line", ['{"problem": "x"}', '{"problem": "x", "completion": ""}', '{"completion": "c"}'])
def test_a_broken_trace_is_named_with_its_line(line: str, tmp_path: pathlib.Path, refuses: Any):
    path = tmp_path / "t.jsonl"
    path.write_text('{"problem": "x", "completion": "c"}\n' + line)
    with refuses(f"{path}, line 2: expected texts in problem and completion, found columns: ", ""):
        read_traces(path)


def test_a_missing_file_is_named(tmp_path: pathlib.Path, refuses: Any):
    with refuses(f"{tmp_path / 't.jsonl'}: no such file", ""):
        read_traces(tmp_path / "t.jsonl")
