"""The pool on programs, in real boxes."""

import os
import pathlib
import queue
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from magistral_jax.records import Problem, Reward, Verdict
from magistral_jax.verify.config import CodeConfig, PoolConfig, RewardConfig, SandboxConfig
from magistral_jax.verify.pool import VerifierPool, VerifyItem

PATIENCE = 120.0
WORDS = "We read the two numbers and print what they add up to. "
TESTS = [{"input": f"{number} {number + 1}\n", "output": f"{2 * number + 1}\n"} for number in range(30)]
RIGHT = "a, b = map(int, input().split())\nprint(a + b)"
CPP = "#include <bits/stdc++.h>\nint main() { long long a, b; std::cin >> a >> b; std::cout << a + b; }"


def program(source: str, language: str = "python", *, tests: Any = TESTS, **fields: Any) -> VerifyItem:
    problem = Problem("sum", WORDS, "", kind="code", extra={"tests": tests, "difficulty": object()})
    completion = f"<think>{WORDS}</think>{WORDS}\n```{language}\n{source}\n```\n"
    return VerifyItem(0, problem, completion, 90, 100, False, **fields)


def math(answer: str) -> VerifyItem:
    return VerifyItem(0, Problem("p", WORDS, "3"), f"<think>{WORDS}</think>{WORDS}\\boxed{{{answer}}}", 90, 100, False)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=2)) as pool:
        yield pool


def test_programs_and_answers_in_one_pool(pool: VerifierPool):
    items = [
        program(RIGHT),
        math("3"),
        program(CPP, "cpp"),
        math("4"),
        program("print(1)"),
        program("int main() {", "c++"),
    ]
    verdicts = [reward.verdict for reward in pool.grade_all(items)]
    right, wrong = Verdict.CORRECT, Verdict.WRONG
    assert verdicts == [right, right, right, wrong, wrong, Verdict.COMPILE_ERROR]
    assert pool.metrics().kinds == {"code": 4, "math": 2}


def test_a_program_earns_all_parts_or_keeps_its_form(pool: VerifierPool):
    right, wrong = pool.grade_all([program(RIGHT), program("print(1)")])
    assert (right.format, right.correctness, right.language) == (0.1, 0.9, 0.1)
    assert right.total == pytest.approx(1.1)
    assert (wrong.format, wrong.correctness, wrong.language) == (0.1, 0.0, 0.1)
    assert right.sandbox in ("bubblewrap", "landlock")


def test_a_program_without_a_fence_is_not_run(pool: VerifierPool):
    item = VerifyItem(0, program("").problem, f"<think>{WORDS}</think>{RIGHT}", 1, 1, False)
    (reward,) = pool.grade_all([item])
    assert (reward.verdict, reward.path, reward.total) == (Verdict.BAD_FORMAT, "no_code_block", 0.0)


def test_all_completions_of_a_group_meet_the_same_tests(pool: VerifierPool):
    """A program that fails on one test of thirty: whether twenty of them notice is up to the seed alone."""
    source = "a, b = map(int, input().split())\nprint(a + b if a != 7 else 0)"
    rewards = pool.grade_all([program(source, test_seed=seed) for seed in range(8) for _ in range(2)])
    verdicts = [reward.verdict for reward in rewards]
    assert verdicts[::2] == verdicts[1::2]
    assert set(verdicts) == {Verdict.CORRECT, Verdict.WRONG}


def test_large_inputs_and_outputs(pool: VerifierPool):
    text = "x" * 3_000_000 + "\n"
    source = "print(input())"
    (reward,) = pool.grade_all([program(source, tests=[{"input": text, "output": text}])])
    assert reward.verdict is Verdict.CORRECT


def test_a_share_of_the_tests_is_rewarded_where_that_is_asked_for():
    source = "a, b = map(int, input().split())\nprint(a + b if a < 10 else 0)"
    code = CodeConfig(num_tests=0, partial=True)
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1), code=code) as pool:
        (reward,) = pool.grade_all([program(source)])
    assert (reward.verdict, reward.correctness) == (Verdict.WRONG, pytest.approx(0.9 * 10 / 30))


def test_unsafe_is_written_into_every_reward():
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1), sandbox=SandboxConfig("unsafe")) as pool:
        rewards = pool.grade_all([math("3"), program(RIGHT), VerifyItem(0, math("").problem, "", 1, 1, False)])
    assert [reward.verdict for reward in rewards] == [Verdict.CORRECT, Verdict.CORRECT, Verdict.BAD_FORMAT]
    assert [reward.sandbox for reward in rewards] == ["unsafe"] * 3


def offspring(pid: int) -> set[int]:
    """All processes below one, from the parents that /proc names."""
    parents: dict[int, int] = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below and child not in below}:
        below |= more
    return below - {pid}


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # gone, or going
        return False


@pytest.mark.parametrize("mechanism", ["bubblewrap", "landlock"])
@pytest.mark.parametrize("end", ["killed", "cancelled", "closed"])
def test_nothing_of_a_box_outlives_its_worker(mechanism: Any, end: str):
    results: queue.Queue[Reward] = queue.Queue()
    code, sandbox = CodeConfig(cpu_seconds=PATIENCE, wall_seconds=PATIENCE), SandboxConfig(mechanism)
    on_result = lambda request_id, reward: results.put(reward)
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1), on_result, code=code, sandbox=sandbox) as pool:
        pool.submit(program("while True: pass"))
        wait_for(lambda: pool.metrics().num_running == 1)
        (worker,) = pool.metrics().worker_pids
        wait_for(lambda: any(_cpu_ticks(pid) > 20 for pid in offspring(worker)))
        boxes = offspring(worker)
        if end == "killed":
            os.kill(worker, signal.SIGKILL)
        elif end == "cancelled":
            pool.cancel_all()
        else:
            pool.close()
        wait_for(lambda: not any(is_alive(pid) for pid in boxes))


def _cpu_ticks(pid: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
    except OSError:
        return 0
