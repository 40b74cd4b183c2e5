import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from magistral_jax.records import Problem, Reward, Verdict
from magistral_jax.verify.config import RewardConfig
from magistral_jax.verify.worker import (
    VerifyItem,
    decode_item,
    decode_reward,
    encode_item,
    encode_reward,
    grade,
    guarded_verdict,
    warm_up,
)


def failing(error: BaseException) -> Callable[[str, str], tuple[Verdict, str]]:
    def grade_math(answer: str, reference: str) -> tuple[Verdict, str]:
        raise error

    return grade_math


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), (Verdict.TOO_LARGE, "memory")),
        (RecursionError(), (Verdict.TOO_LARGE, "recursion")),
        (KeyError("a defect"), (Verdict.SANDBOX_ERROR, "KeyError")),
    ],
)
def test_a_defect_of_the_grader_is_no_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: tuple[Verdict, str]
):
    monkeypatch.setattr("magistral_jax.verify.worker.grade_math", failing(error))
    assert guarded_verdict("1", "2") == expected


def test_the_self_test_notices_a_grader_that_does_not_grade(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("magistral_jax.verify.reward.grade_math", lambda answer, reference: (Verdict.WRONG, "broken"))
    with pytest.raises(RuntimeError, match="self-test"):
        warm_up(RewardConfig())


def test_the_form_comes_before_the_verdict():
    words = "We add the two numbers and look at the result. "
    completion = f"<think>{words}</think>{words}\\boxed{{3}}"
    item = VerifyItem(0, Problem("p", words, "3"), completion, 1, 1, False)
    (first, form), (second, reward) = grade(item, RewardConfig())
    assert (first, form.format, form.language, form.correctness) == ("form", 0.1, 0.1, 0.0)
    assert form.verdict.is_infrastructure_failure, "a form alone must never pass for a graded reward"
    assert (second, reward.verdict) == ("verdict", Verdict.CORRECT)
    assert [kind for kind, _ in grade(VerifyItem(0, item.problem, "3", 1, 1, False), RewardConfig())] == ["verdict"]


def test_items_and_rewards_survive_the_wire():
    item = VerifyItem(3, Problem("p", "é\n\ud800", "\\frac12", extra={"a": object()}), "\u2028\x00", 5, 6, True)
    line = encode_item(item)
    assert line.count("\n") == 1
    assert line.isascii()
    assert decode_item(line) == VerifyItem(3, Problem("p", "é\n\ud800", "\\frac12"), "\u2028\x00", 5, 6, True)
    reward = Reward(Verdict.TIMEOUT, 0.1, 0.0, -0.05, 0.1, "deadline", 5.0, "consistent")
    assert decode_reward(encode_reward(reward)) == reward


def test_memory_is_limited():
    code = """if True:
        from magistral_jax.verify.worker import confine
        confine(512)
        try:
            hog = bytearray(2**30)
        except MemoryError:
            print("limited")
    """
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout == "limited\n"
