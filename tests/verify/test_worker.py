import socket

import pytest

from magistral_jax.records import Problem, Verdict
from magistral_jax.verify.config import CodeConfig, RewardConfig
from magistral_jax.verify.item import Message, Task, VerifyItem, decode_message
from magistral_jax.verify.judges import Decision, judge_math
from magistral_jax.verify.reward import Submission
from magistral_jax.verify.sandbox.mechanism import Mechanism
from magistral_jax.verify.worker import WorkerConfig, grade, serve, warm_up

WORDS = "We add the two numbers and look at the result. "


def task(answer: str) -> Task:
    completion = f"<think>{WORDS}</think>{WORDS}\\boxed{{{answer}}}"
    return Task(VerifyItem(0, Problem("p", WORDS, "3"), completion, 1, 1, False))


def test_the_form_comes_before_the_verdict():
    form, verdict = grade(task("3"), RewardConfig(), judge_math)
    assert form.reward is not None
    assert (form.kind, form.reward.format, form.reward.language, form.reward.correctness) == ("form", 0.1, 0.1, 0.0)
    assert form.reward.verdict.is_infrastructure_failure, "a form alone must never pass for a graded reward"
    assert verdict.reward is not None
    assert (verdict.kind, verdict.reward.verdict, verdict.reward.correctness) == ("verdict", Verdict.CORRECT, 0.9)
    assert verdict.reward.seconds > 0


def test_a_completion_that_fails_the_gate_is_not_judged():
    def judge(task: Task, submission: Submission) -> Decision:
        raise AssertionError("judged")

    (only,) = grade(Task(VerifyItem(0, Problem("p", WORDS, "3"), "3", 1, 1, False)), RewardConfig(), judge)
    assert only.kind == "verdict"
    assert only.reward is not None
    assert only.reward.verdict is Verdict.BAD_FORMAT


def test_a_share_of_the_tests_is_a_share_of_the_reward():
    judge = lambda task, submission: Decision(Verdict.WRONG, "tests", 0.25)
    *_, message = grade(task("3"), RewardConfig(), judge)
    assert message.reward is not None
    assert (message.reward.verdict, message.reward.correctness) == (Verdict.WRONG, pytest.approx(0.225))
    assert message.reward.total == pytest.approx(0.1 + 0.1 + 0.225)


def test_a_defect_of_the_grader_is_no_wrong_answer():
    def judge(task: Task, submission: Submission) -> Decision:
        raise KeyError("a defect")

    *_, message = grade(task("3"), RewardConfig(), judge)
    assert message.reward is not None
    assert (message.reward.verdict, message.reward.path) == (Verdict.SANDBOX_ERROR, "KeyError")
    assert message.reward.format == 0.1
    assert message.detail == "'a defect'"


def test_the_self_test_notices_a_grader_that_does_not_grade(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("magistral_jax.verify.reward.grade_math", lambda *texts, **how: (Verdict.WRONG, "broken"))
    with pytest.raises(RuntimeError, match="self-test"):
        warm_up(RewardConfig())


def served(monkeypatch: pytest.MonkeyPatch, kind: str, function=None) -> list[Message]:
    """What a worker says that is left alone, without its confinement: this is the test's own process."""
    monkeypatch.setattr("magistral_jax.verify.worker.confine_grader", lambda *arguments, **limits: None)
    monkeypatch.setattr("magistral_jax.verify.worker.silence", lambda: None)
    ours, theirs = socket.socketpair()
    config = WorkerConfig(RewardConfig(), CodeConfig(compiler="no-such-compiler"), Mechanism.UNSAFE, 1024)
    with ours, theirs:
        ours.shutdown(socket.SHUT_WR)
        serve(theirs, kind, config, function)
        theirs.shutdown(socket.SHUT_WR)
        return [decode_message(line) for line in ours.makefile("rb")]


def test_a_worker_says_when_it_is_ready(monkeypatch: pytest.MonkeyPatch):
    (message,) = served(monkeypatch, "math")
    assert message.kind == "ready"
    assert message.pid > 0


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch):
    (message,) = served(monkeypatch, "code")
    assert message.kind == "failed"
    assert "no-such-compiler" in message.detail
