"""A verifier worker: grades one completion after another, in a process of its own that may be killed at any time.

In: tasks. Out: two messages for each, `form` at once and `verdict` when it is known, so that the parent still has the
cheap parts of a reward when it has to kill the worker over the costly one.

There are three kinds. A "math" worker and one that runs an own reward "function" evaluate what they are given, and so
are confined themselves, for good, before the first task. A "code" worker evaluates nothing: it hands programs to boxes,
which it must be able to start, and compares bytes.
"""

import contextlib
import dataclasses
import mmap
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator

from magistral_jax.records import Problem, Verdict
from magistral_jax.verify.code_grade import CodeGrader
from magistral_jax.verify.config import CodeConfig, RewardConfig
from magistral_jax.verify.item import Message, Task, encode_message, read_task
from magistral_jax.verify.judges import CodeJudge, Decision, FunctionJudge, Judge, judge_math
from magistral_jax.verify.reward import UNGRADED, settle, shape_form, shape_reward
from magistral_jax.verify.reward_function import RewardFunction
from magistral_jax.verify.sandbox.grader import confine_grader
from magistral_jax.verify.sandbox.mechanism import Mechanism


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """All that a worker needs to know."""

    reward: RewardConfig
    code: CodeConfig
    mechanism: Mechanism
    memory_mib: int


_HEADROOM_MIB = 64

WARM_UP = (
    ("\\frac{1}{2}", "0.5"),
    ("(x-1)(x+1)", "x^2-1"),
    ("\\{2, 1\\}", "\\{1, 2\\}"),
    ("\\sum_{k=1}^{n} k", "\\frac{n(n+1)}{2}"),
)
"""Equal answers that load what grading needs: parsers, numeric probe, SymPy."""


# ---- one task -------------------------------------------------------------------------------------------------------


def grade(task: Task, config: RewardConfig, judge: Judge) -> Iterator[Message]:
    """Yield `form` with the reward so far, unless the format gate fails, and then `verdict` with the final reward."""
    start = time.monotonic()
    form = UNGRADED
    try:
        form, submission = shape_form(task.item, config)
        if submission is None:
            explanation = {"extracted": None} if task.is_explained else {}
            form = dataclasses.replace(form, seconds=time.monotonic() - start)
            yield Message("verdict", form, explanation=explanation)
            return
        yield Message("form", form)
        decision = judge(task, submission)
    except Exception as error:  # a defect of ours must not pass for a wrong answer
        decision = Decision(Verdict.SANDBOX_ERROR, type(error).__name__, detail=str(error))
    reward = settle(form, decision.verdict, decision.path, config.correctness * decision.score)
    reward = dataclasses.replace(reward, seconds=time.monotonic() - start)
    yield Message("verdict", reward, detail=decision.detail, explanation=decision.explanation)


def warm_up(config: RewardConfig) -> None:
    """Load everything that grading math needs, and check that it grades.

    Raises:
      RuntimeError: A completion that is known to be right is not found right.
    """
    config = dataclasses.replace(config, function="")
    words = "We look at the problem, think about it for a while, and then write the answer down: "
    for answer, reference in WARM_UP:
        completion = f"{config.think_open}{words}{config.think_close}{words}\\boxed{{{answer}}}"
        reward = shape_reward(completion, Problem("warm-up", words, reference), 1, 1, False, config)
        if reward.verdict is not Verdict.CORRECT:
            raise RuntimeError(f"self-test: {answer} against {reference} is {reward.verdict.value} ({reward.path})")


# ---- the process ----------------------------------------------------------------------------------------------------


def serve(connection: socket.socket, kind: str, config: WorkerConfig, function: RewardFunction | None) -> None:
    """Grade until the other end is closed. Says `ready` once a completion could be graded within the limits.

    Args:
      connection: To the parent.
      kind: "math", "code" or "function".
      config: Settings.
      function: What a function worker calls.
    """
    silence()
    with connection.makefile("rb") as tasks, contextlib.ExitStack() as stack:
        try:
            judge = stack.enter_context(_prepared(kind, config, function))
        except Exception as error:
            connection.sendall(encode_message(Message("failed", detail=f"{type(error).__name__}: {error}")))
            return
        connection.sendall(encode_message(Message("ready", pid=os.getpid())))
        peak_at_start = _peak_mib()
        while (task := read_task(tasks)) is not None:
            for message in grade(task, config.reward, judge):
                growth = _peak_mib() - peak_at_start
                about = dataclasses.replace(message, serial=task.serial, growth_mib=growth)
                connection.sendall(encode_message(about))


@contextlib.contextmanager
def _prepared(kind: str, config: WorkerConfig, function: RewardFunction | None) -> Iterator[Judge]:
    """Confine the process, or start its boxes; yields what judges."""
    if kind == "code":
        with CodeGrader(config.mechanism, config.code) as grader:
            yield CodeJudge(grader, config.code.partial)
        return
    confine_grader(config.mechanism, memory_mib=config.memory_mib, readable=[*sys.path, sys.prefix, sys.base_prefix])
    mmap.mmap(-1, _HEADROOM_MIB * 2**20).close()  # else too low a limit would be taken for the size of answers
    if function is not None:
        yield FunctionJudge(function)
        return
    warm_up(config.reward)
    yield judge_math


def silence() -> None:
    """Throw away what is written to standard error from now on: what a user's function prints must not fill a disk."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
