"""Who decides on a submission: the math grader, the tests of a program, or a user's own function.

In: a task and what the format gate found in its completion. Out: a verdict with its path and score. A judge raises only
where it is itself at fault.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from magistral_jax.records import Verdict
from magistral_jax.verify.code_grade import CodeGrader, CodeVerdict
from magistral_jax.verify.explain import explain_math
from magistral_jax.verify.format import CodeBlock
from magistral_jax.verify.item import Task
from magistral_jax.verify.math_answer import asks_for_order, grade_math
from magistral_jax.verify.reward import Submission
from magistral_jax.verify.reward_function import RewardFunction, call_function


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a judge found out."""

    verdict: Verdict
    path: str
    score: float = 0.0
    """Share of the correctness reward."""
    detail: str = ""
    """Of a failure: what happened, for people."""
    explanation: dict[str, Any] = dataclasses.field(default_factory=dict)


Judge = Callable[[Task, Submission], Decision]


def judge_math(task: Task, submission: Submission) -> Decision:
    """`grade_math`, with verdicts for what it may run out of: memory and stack are the answer's fault."""
    assert isinstance(submission.answer, str)
    problem = task.item.problem
    is_ordered = asks_for_order(problem.statement)
    try:
        verdict, path = grade_math(submission.answer, problem.answer, is_ordered=is_ordered)
        explanation = (
            explain_math(submission.answer, problem.answer, is_ordered=is_ordered) if task.is_explained else {}
        )
    except MemoryError:
        return Decision(Verdict.TOO_LARGE, "memory")
    except RecursionError:
        return Decision(Verdict.TOO_LARGE, "recursion")
    return Decision(verdict, path, float(verdict is Verdict.CORRECT), explanation=explanation)


@dataclasses.dataclass(frozen=True)
class CodeJudge:
    """Runs programs on their tests; `partial` scores the share that passed in the place of all or nothing."""

    grader: CodeGrader
    partial: bool

    def __call__(self, task: Task, submission: Submission) -> Decision:
        """Judge one program."""
        assert isinstance(submission.answer, CodeBlock)
        assert task.tests is not None
        found = self.grader.grade(submission.answer, task.tests)
        score = found.passed / found.total if self.partial else float(found.verdict is Verdict.CORRECT)
        explanation = explain_code(submission.answer, found) if task.is_explained else {}
        return Decision(found.verdict, found.path, score, found.detail, explanation)


@dataclasses.dataclass(frozen=True)
class FunctionJudge:
    """Calls a user's function. An exception from it is a bug to be reported, and must not become a reward of 0."""

    function: RewardFunction

    def __call__(self, task: Task, submission: Submission) -> Decision:
        """Judge one completion."""
        try:
            score = call_function(self.function, task.item, submission)
        except (Exception, SystemExit) as error:
            return Decision(Verdict.SANDBOX_ERROR, f"function:{type(error).__name__}", detail=str(error))
        explanation = {"thoughts": shorten(submission.sections.thoughts), "score": score} if task.is_explained else {}
        return Decision(Verdict.CORRECT if score == 1.0 else Verdict.WRONG, "function", score, "", explanation)


# ---- explanations, as JSON values -----------------------------------------------------------------------------------

_SHOWN = 400  # characters of a text


def explain_code(block: CodeBlock, found: CodeVerdict) -> dict[str, Any]:
    """What became of a program, for people."""
    is_compiled = found.verdict is not Verdict.COMPILE_ERROR
    explanation: dict[str, Any] = {
        "language": block.language,
        "source": shorten(block.source),
        "compiles": is_compiled,
        "words": shorten(found.detail),  # of the compiler, or of the program to its standard error
        "tests_passed": found.passed,
        "tests_sampled": found.total,
    }
    if found.failed is not None:
        explanation["first_failed_test"] = {
            "number": found.failed.number,
            "input": shorten(found.failed.input or found.failed.code),
            "expected": shorten(found.failed.output),
            "got": shorten(found.printed),
        }
    return explanation


def shorten(text: str | bytes) -> str:
    """The beginning of a text."""
    if isinstance(text, bytes):
        text = text[: 4 * _SHOWN].decode("utf-8", "replace")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
