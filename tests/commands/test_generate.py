"""Completions from the command line: one JSON line each, in order, the same ones every time."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def generate(tiny: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    def run(**settings: Any) -> list[dict[str, Any]]:
        named = {name.replace("__", "."): value for name, value in settings.items()}
        small = {"data.num_evaluation": 3, "evaluation.num_samples": 2, "evaluation.temperature": 1.0}
        tiny.run("generate", small | named)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_completions_are_lines_in_order(generate: Callable[..., list[dict[str, Any]]]):
    lines = generate()
    assert len(lines) == 6
    assert [line["problem"] for line in lines[::2]] == [line["problem"] for line in lines[1::2]]
    assert len({line["problem"] for line in lines}) == 3
    assert lines[0].keys() == {
        "problem",
        "prompt",
        "completion",
        "reference",
        "completion_tokens",
        "logprob",
        "truncated",
    }
    for line in lines:
        assert re.fullmatch(r"<think>\.+</think>\\boxed\{[5-8]\}", line["completion"])
        # Each tag is one token; the stop token is counted and not shown.
        num_dots = line["completion"].count(".")
        assert line["completion_tokens"] == num_dots + len("\\boxed{5}") + 3
        # Every dot but the first has probability 0.6, the end of the dots 0.4, the digit a quarter.
        expected = (num_dots - 1) * -0.5108256 - 0.9162907 - 1.3862944
        assert line["logprob"] == pytest.approx(expected, abs=1e-3)
        assert not line["truncated"]
    assert len({line["completion"] for line in lines}) > 1


def test_the_seed_decides(generate: Callable[..., list[dict[str, Any]]]):
    assert generate(run__seed=1) == generate(run__seed=1) != generate(run__seed=2)


def test_a_completion_at_the_limit_is_marked(generate: Callable[..., list[dict[str, Any]]]):
    lines = generate(generation__max_new_tokens=8)
    assert all(line["truncated"] and line["completion_tokens"] == 8 for line in lines)
