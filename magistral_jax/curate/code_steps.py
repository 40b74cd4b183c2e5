"""The judgement on one code problem: its solutions on its tests, repaired and new tests; in: both, out: who stays.

Source: Magistral (arXiv:2506.10910), section 4.2.
"""

import dataclasses
from typing import Any

from magistral_jax.curate.code_inputs import new_calls, new_inputs
from magistral_jax.curate.code_problems import Case, CodeProblem
from magistral_jax.curate.code_runs import Execute
from magistral_jax.curate.code_votes import says_several_answers, unanimous, vote
from magistral_jax.curate.config import CurateConfig
from magistral_jax.data.overlap import Removal
from magistral_jax.records import Problem
from magistral_jax.verify.code_tests import Language

TEST_COLUMNS = ("test", "tests", "test_list", "solution", "solutions", "entry_point", "kind")


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of a code problem."""

    id: str
    reason: str = ""
    """Why it is removed; empty where it stays."""
    detail: str = ""
    tests: tuple[dict[str, str], ...] = ()
    solutions: tuple[dict[str, str], ...] = ()
    """Those that are believed."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tests that were kept as they are, repaired, dropped and new; solutions that were not believed."""


def judge(problem: CodeProblem, execute: Execute, config: CurateConfig, seed: int) -> Judged:
    """Run the solutions on the tests and decide.

    Args:
      problem: With solutions and tests.
      execute: Runs a solution.
      config: How many tests it takes and how many new ones are tried.
      seed: Of new inputs.
    """
    problem_id = problem.problem.id
    has_checker = bool(problem.problem.extra.get("checker"))
    if problem.limits.checker is not None:
        return Judged(problem_id, "checker program", "problems that are judged by a program are not curated yet")
    if says_several_answers(problem.problem.statement) and not has_checker:
        return Judged(problem_id, "several answers", "the statement says so, and there is no checker")
    given = [case.given for case in problem.cases]
    outputs = [execute(solution, given) for solution in problem.solutions]
    votes = vote(outputs, [case.expected for case in problem.cases], problem.agree)
    counts = {
        "tests_kept": sum(want is not None for want in votes.expected) - votes.num_repaired,
        "tests_repaired": votes.num_repaired,
        "tests_dropped": votes.expected.count(None),
        "solutions_dropped": len(problem.solutions) - len(votes.trusted),
    }
    if votes.is_split and not has_checker:
        return Judged(problem_id, "several answers", "the solutions disagree on most tests", counts=counts)
    if not votes.trusted:
        return Judged(problem_id, "no right solution", f"of {len(problem.solutions)}", counts=counts)
    kept = [Case(text, want) for text, want in zip(given, votes.expected, strict=True) if want is not None]
    made = _new_cases(problem, votes.trusted, execute, min(config.max_tests - len(kept), config.new_tests), seed)
    counts["tests_new"] = len(made)
    if len(kept) + len(made) < config.min_tests:
        return Judged(problem_id, "too few tests", f"{len(kept) + len(made)}", counts=counts)
    trusted = [problem.solutions[place] for place in votes.trusted]
    return Judged(
        problem_id,
        tests=tuple(problem.test(case) for case in [*kept, *made]),
        solutions=tuple({"language": s.language.value, "source": s.source} for s in trusted),
        counts=counts,
    )


def _new_cases(problem: CodeProblem, trusted: tuple[int, ...], execute: Execute, num: int, seed: int) -> list[Case]:
    """New tests: inputs on which all trusted solutions agree. One solution alone makes none."""
    if len(trusted) < 2 or num <= 0:
        return []
    make = new_calls if problem.is_call else new_inputs
    given = make([case.given for case in problem.cases], num, f"{seed}:{problem.problem.id}")
    outputs = [execute(problem.solutions[place], given) for place in trusted]
    answers = [unanimous(column, problem.agree) for column in zip(*outputs, strict=True)]
    return [Case(text, answer) for text, answer in zip(given, answers, strict=True) if answer is not None]


REQUESTS = {
    Language.PYTHON: "Write the program in Python.",
    Language.CPP: "Write the program in C++.",
}
"""What is added to a statement, which then asks for one language."""


def for_languages(problem: Problem, judged: Judged) -> list[Problem]:
    """The problem with its new tests, once for each language that its tests can run.

    Args:
      problem: As it was read.
      judged: With a result.
    """
    columns: dict[str, Any] = {name: value for name, value in problem.extra.items() if name not in TEST_COLUMNS}
    columns |= {"tests": list(judged.tests), "solutions": list(judged.solutions), **judged.counts}
    is_call = any("code" in test for test in judged.tests)
    return [
        dataclasses.replace(
            problem,
            id=f"{problem.id}/{language.value}",
            statement=f"{problem.statement.rstrip()}\n\n{request}",
            extra={**columns, "language": language.value},
        )
        for language, request in REQUESTS.items()
        if language is Language.PYTHON or not is_call
    ]


def removal(judged: Judged) -> Removal | None:
    """Why the problem is removed, if so."""
    return Removal(judged.id, judged.reason, judged.detail) if judged.reason else None
