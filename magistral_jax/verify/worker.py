"""A verifier worker: grades one completion after another, in a process of its own that may be killed at any time.

In: one JSON line per completion. Out: two JSON lines for each, `form` at once and `verdict` when it is known, so that
the parent still has the cheap parts of a reward when it has to kill the worker over the costly one.
"""

import dataclasses
import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

from magistral_jax.records import Problem, Reward, Verdict
from magistral_jax.verify.config import RewardConfig
from magistral_jax.verify.math_answer import grade_math
from magistral_jax.verify.reward import settle, shape_form, shape_reward


@dataclasses.dataclass(frozen=True)
class VerifyItem:
    """One completion to be graded."""

    request_id: int
    problem: Problem
    completion: str
    num_tokens: int
    max_length: int
    truncated: bool


_HEADROOM_MIB = 64

WARM_UP = (
    ("\\frac{1}{2}", "0.5"),
    ("(x-1)(x+1)", "x^2-1"),
    ("\\{2, 1\\}", "\\{1, 2\\}"),
    ("\\sum_{k=1}^{n} k", "\\frac{n(n+1)}{2}"),
)
"""Equal answers that load what grading needs: parsers, numeric probe, SymPy."""


def grade(item: VerifyItem, config: RewardConfig) -> Iterator[tuple[str, Reward]]:
    """Yield ("form", reward so far), unless the format gate fails, and then ("verdict", final reward)."""
    start = time.monotonic()
    form, answer = shape_form(item.completion, item.problem, item.num_tokens, item.max_length, item.truncated, config)
    if answer is None:
        yield "verdict", dataclasses.replace(form, seconds=time.monotonic() - start)
        return
    yield "form", form
    verdict, path = guarded_verdict(answer, item.problem.answer)
    yield "verdict", dataclasses.replace(settle(form, verdict, path, config), seconds=time.monotonic() - start)


def guarded_verdict(answer: str, reference: str) -> tuple[Verdict, str]:
    """`grade_math` with verdicts for its exceptions: memory and stack are the answer's fault, the rest is ours."""
    try:
        return grade_math(answer, reference)
    except MemoryError:
        return Verdict.TOO_LARGE, "memory"
    except RecursionError:
        return Verdict.TOO_LARGE, "recursion"
    except Exception as error:  # a defect of the grader must not pass for a wrong answer
        return Verdict.SANDBOX_ERROR, type(error).__name__


def warm_up(config: RewardConfig) -> None:
    """Load everything that grading needs, and check that it grades.

    Raises:
      RuntimeError: A completion that is known to be right is not found right.
    """
    words = "We look at the problem, think about it for a while, and then write the answer down: "
    for answer, reference in WARM_UP:
        completion = f"{config.think_open}{words}{config.think_close}{words}\\boxed{{{answer}}}"
        reward = shape_reward(completion, Problem("warm-up", words, reference), 1, 1, False, config)
        if reward.verdict is not Verdict.CORRECT:
            raise RuntimeError(f"self-test: {answer} against {reference} is {reward.verdict.value} ({reward.path})")


def confine(memory_mib: int) -> None:
    """Limit this process's address space and switch core dumps off. Not undone.

    Raises:
      MemoryError: The limit leaves so little that it would be taken for the size of answers.
    """
    limit = memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bytearray(_HEADROOM_MIB * 2**20)


def serve(connection: socket.socket, config: RewardConfig, memory_mib: int) -> None:
    """Grade until the other end is closed. Says `ready` once a completion could be graded within the limits."""
    confine(memory_mib)
    warm_up(config)
    with connection.makefile("rw", encoding="ascii") as stream:

        def send(message: dict[str, Any]) -> None:
            stream.write(json.dumps(message) + "\n")
            stream.flush()

        send({"kind": "ready", "pid": os.getpid()})
        for line in stream:
            for kind, reward in grade(decode_item(line), config):
                send({"kind": kind, "reward": encode_reward(reward)})


def encode_item(item: VerifyItem) -> str:
    """One ASCII line. Of the problem's `extra` columns nothing is sent."""
    problem = dataclasses.replace(item.problem, extra={})
    return json.dumps(dataclasses.asdict(dataclasses.replace(item, problem=problem))) + "\n"


def decode_item(line: str) -> VerifyItem:
    """Inverse of `encode_item`."""
    fields = json.loads(line)
    return VerifyItem(**{**fields, "problem": Problem(**fields["problem"])})


def encode_reward(reward: Reward) -> dict[str, Any]:
    """A reward as JSON values."""
    return {**dataclasses.asdict(reward), "verdict": reward.verdict.value}


def decode_reward(fields: dict[str, Any]) -> Reward:
    """Inverse of `encode_reward`."""
    return Reward(**{**fields, "verdict": Verdict(fields["verdict"])})
