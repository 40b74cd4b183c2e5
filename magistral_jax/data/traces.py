"""Completions to imitate before reinforcement learning (cold start); in: Problems or a file, out: Traces.

The generated ones are for the quickstart: a model that starts from random weights must first learn what a completion
looks like. Part of them think step by step and part of them guess, so that afterwards there is something to reinforce.
"""

import dataclasses
import pathlib
import re

import numpy as np

from magistral_jax.data import templated
from magistral_jax.data.rows import read_rows
from magistral_jax.data.sources import STATEMENT_COLUMNS
from magistral_jax.records import MagistralError, Problem

_TERM = re.compile(r"([+-]?)\s*(-?\d+)\s*")


@dataclasses.dataclass(frozen=True)
class Trace:
    """A problem with a completion to imitate; the stop token is not part of the text."""

    problem: Problem
    completion: str


def read_traces(path: str | pathlib.Path) -> list[Trace]:
    """Traces from JSON lines or Parquet: `problem` (or `question`, `statement`) and `completion`, optionally `answer`.

    Raises:
      MagistralError: The file is missing, empty or malformed; the sentence names the line.
    """
    path = pathlib.Path(path)
    traces: list[Trace] = []
    for line, row in read_rows(path):
        statement = next((row[name] for name in STATEMENT_COLUMNS if row.get(name)), None)
        completion = row.get("completion")
        if not (isinstance(statement, str) and isinstance(completion, str) and completion):
            raise MagistralError(
                f"{path}, line {line}: expected texts in problem and completion, found columns: {', '.join(row)}"
            )
        problem = Problem(f"{path.stem}:{line}", statement, str(row.get("answer", "")))
        traces.append(Trace(problem, completion))
    return traces


def make_traces(
    problems: list[Problem],
    rng: np.random.Generator,
    *,
    thorough_share: float,
    lucky_share: float = 0.25,
    native_share: float = 1.0,
    think_tags: tuple[str, str] = ("<think>", "</think>"),
) -> list[Trace]:
    """One trace for each sum, thorough or hasty; a function of its arguments.

    Args:
      problems: From `reasoning-gym:chain_sum` or `templated:sums`.
      rng: Its draws decide the style of each trace and the guesses.
      thorough_share: Probability that a trace thinks step by step.
      lucky_share: Probability that a hasty guess is right.
      native_share: Probability that thoughts and answer to a templated problem are in its language; the others are in
        English. Chains of sums have no language.
      think_tags: Opening and closing tag of the thoughts.
    """
    traces: list[Trace] = []
    for problem in problems:
        is_thorough = rng.random() < thorough_share
        if templated.is_templated(problem):
            language = problem.extra["language"] if rng.random() < native_share else "en"
            result = int(problem.answer) if is_thorough else _guess(int(problem.answer), rng, lucky_share)
            thoughts, answer = templated.completion_words(problem, result, language, is_thorough=is_thorough)
        else:
            thoughts, result = thorough_thoughts(problem) if is_thorough else hasty_thoughts(problem, rng, lucky_share)
            answer = f"\\boxed{{{result}}}"
        traces.append(Trace(problem, f"{think_tags[0]}{thoughts}{think_tags[1]}{answer}"))
    return traces


def thorough_thoughts(problem: Problem) -> tuple[str, int]:
    r"""The running results of a chain of sums, one step on each line, and the result.

    `4 - 1 + 7` gives ("4-1=3\n3+7=10", 10).
    """
    first, *rest = _terms(problem)
    result = first
    steps: list[str] = []
    for term in rest:
        steps.append(f"{result}{term:+d}={result + term}")
        result += term
    return "\n".join(steps) or f"{first}", result


def hasty_thoughts(problem: Problem, rng: np.random.Generator, lucky_share: float) -> tuple[str, int]:
    """A guess without a step: the result with probability `lucky_share`, else a number nearby."""
    guess = _guess(sum(_terms(problem)), rng, lucky_share)
    return f"looks like {guess}", guess


def _guess(result: int, rng: np.random.Generator, lucky_share: float) -> int:
    offset = 0 if rng.random() < lucky_share else int(rng.integers(1, 10)) * (1 if rng.random() < 0.5 else -1)
    return result + offset


def _terms(problem: Problem) -> list[int]:
    """Signed terms of the expression in the metadata of a chain_sum problem."""
    expression = (problem.extra.get("metadata") or {}).get("expression", "")
    matches = list(_TERM.finditer(expression))
    if not matches or "".join(match[0] for match in matches) != expression:
        raise MagistralError(
            f"problem {problem.id}: traces are generated for reasoning-gym:chain_sum and templated:sums only; expected "
            f"an expression of sums in its metadata, found {expression!r} (set sft.traces to a file for other problems)"
        )
    return [-int(match[2]) if match[1] == "-" else int(match[2]) for match in matches]
