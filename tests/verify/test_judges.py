from collections.abc import Callable
from typing import Any

import pytest

from magistral_jax.records import Problem, Verdict
from magistral_jax.verify.format import Sections
from magistral_jax.verify.item import Task, VerifyItem
from magistral_jax.verify.judges import Decision, FunctionJudge, judge_math
from magistral_jax.verify.reward import Submission

TASK = Task(VerifyItem(0, Problem("p", "s", "3"), "", 1, 1, False))


def of(answer: str) -> Submission:
    return Submission(Sections("", ""), answer)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **columns: Any) -> Any:
        raise error

    return fail


def test_math():
    assert judge_math(TASK, of("3")) == Decision(Verdict.CORRECT, "string", 1.0)
    assert judge_math(TASK, of("4")).score == 0.0


@pytest.mark.parametrize(("error", "path"), [(MemoryError(), "memory"), (RecursionError(), "recursion")])
def test_what_an_answer_uses_up_is_its_own_fault(monkeypatch: pytest.MonkeyPatch, error: BaseException, path: str):
    monkeypatch.setattr("magistral_jax.verify.judges.grade_math", failing(error))
    assert judge_math(TASK, of("3")) == Decision(Verdict.TOO_LARGE, path)


def test_a_defect_of_the_grader_is_raised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("magistral_jax.verify.judges.grade_math", failing(KeyError("a defect")))
    with pytest.raises(KeyError):
        judge_math(TASK, of("3"))


def test_a_function_gives_a_share():
    score = lambda share: FunctionJudge(lambda **columns: share)(TASK, of(""))
    assert score(1) == Decision(Verdict.CORRECT, "function", 1.0)
    assert score(0.5) == Decision(Verdict.WRONG, "function", 0.5)
    assert score(0.0) == Decision(Verdict.WRONG, "function", 0.0)


@pytest.mark.parametrize(
    ("error", "name"), [(KeyError("bug"), "KeyError"), (SystemExit(1), "SystemExit"), (MemoryError(), "MemoryError")]
)
def test_a_bug_of_a_function_is_never_a_wrong_answer(error: BaseException, name: str):
    decision = FunctionJudge(failing(error))(TASK, of(""))
    assert (decision.verdict, decision.path) == (Verdict.SANDBOX_ERROR, f"function:{name}")


def test_a_share_that_is_none_is_a_bug_of_the_function():
    for share in (None, 2.0, float("nan"), "1"):
        decision = FunctionJudge(lambda share=share, **columns: share)(TASK, of(""))
        assert decision.verdict is Verdict.SANDBOX_ERROR
