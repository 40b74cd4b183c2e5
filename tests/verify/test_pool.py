"""The pool against hanging, dying and missing workers. Bounds on time are generous: the machine may be busy."""

import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from magistral_jax.records import MagistralError, Problem, Reward, Verdict
from magistral_jax.verify.config import PoolConfig, RewardConfig
from magistral_jax.verify.pool import VerifierPool, VerifyItem

WORDS = "We add the two numbers and look at the result for a moment. "
HANG = r"\sum_{k=1}^{10000000} \frac{1}{k^3+k+1}"  # SymPy works on it for minutes
PATIENCE = 120.0


def item(answer: str, reference: str = "3", request_id: int = 0) -> VerifyItem:
    problem = Problem("p", "What is the sum of one and two in this problem?", reference, extra={"not": {"sent"}})
    return VerifyItem(request_id, problem, f"<think>{WORDS}</think>{WORDS}\\boxed{{{answer}}}", 90, 100, False)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def patient() -> Iterator[VerifierPool]:
    """Two workers that nobody kills."""
    with VerifierPool(RewardConfig(length_cache=20), PoolConfig(deadline=PATIENCE)) as pool:
        yield pool


def test_rewards_come_in_the_order_of_the_items(patient: VerifierPool):
    answers = [str(number) for number in range(40)]
    rewards = patient.grade_all([item(answer, "7") for answer in answers])
    assert [reward.verdict is Verdict.CORRECT for reward in rewards] == [answer == "7" for answer in answers]
    assert patient.grade_all([]) == []


def test_every_part_of_the_reward_comes_back(patient: VerifierPool):
    (reward,) = patient.grade_all([item("6/2")])
    assert (reward.verdict, reward.path, reward.language_note) == (Verdict.CORRECT, "rational", "consistent")
    assert (reward.format, reward.correctness, reward.length, reward.language) == (0.1, 0.9, -0.05, 0.1)
    assert reward.seconds > 0


def test_any_text_reaches_the_worker(patient: VerifierPool):
    texts = ["", "\x00", "\ud800", "\n\r\u2028", "<think>", "z" * 3_000_000, "<think></think>" + "\\boxed{" * 100_000]
    for text in texts:
        completion = VerifyItem(0, Problem("p", text, text), text, 1, 1, True)
        assert patient.grade_all([completion])[0].verdict is Verdict.BAD_FORMAT


def test_code_is_refused_at_the_door(patient: VerifierPool):
    code = VerifyItem(0, Problem("c", "s", "a", kind="code"), "x", 1, 1, False)
    with pytest.raises(MagistralError, match="code verification is not available"):
        patient.grade_all([code])


def test_submit_needs_somebody_to_tell(patient: VerifierPool):
    with pytest.raises(MagistralError, match="on_result"):
        patient.submit(item("3"))


def test_callers_in_many_threads(patient: VerifierPool):
    verdicts: list[Verdict] = []
    threads = [
        threading.Thread(target=lambda: verdicts.extend(r.verdict for r in patient.grade_all([item("3")] * 10)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert verdicts == [Verdict.CORRECT] * 40


def test_a_killed_worker_costs_nothing(patient: VerifierPool):
    """Both workers are stopped, so the items are with them when they are killed."""
    wait_for(lambda: len(patient.metrics().worker_pids) == 2)
    pids, before = patient.metrics().worker_pids, patient.metrics()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    rewards: list[Reward] = []
    thread = threading.Thread(target=lambda: rewards.extend(patient.grade_all([item("3"), item("4")])))
    thread.start()
    wait_for(lambda: patient.metrics().num_running == 2)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    thread.join(PATIENCE)
    assert [reward.verdict for reward in rewards] == [Verdict.CORRECT, Verdict.WRONG]
    wait_for(lambda: len(patient.metrics().worker_pids) == 2)
    assert not set(pids) & set(patient.metrics().worker_pids)
    assert patient.metrics().num_forks == before.num_forks + 2


def test_workers_that_were_killed_while_idle_cost_nothing_either(patient: VerifierPool):
    wait_for(lambda: len(patient.metrics().worker_pids) == 2)
    for _ in range(5):
        pids = patient.metrics().worker_pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda pids=pids: not any(is_alive(pid) for pid in pids))
        assert patient.grade_all([item("3")])[0].verdict is Verdict.CORRECT


def test_an_item_whose_workers_die_twice_is_an_infrastructure_failure():
    results: queue.Queue[tuple[int, Reward]] = queue.Queue()
    pool = PoolConfig(num_workers=1, deadline=PATIENCE)
    with VerifierPool(RewardConfig(), pool, lambda *result: results.put(result)) as verifiers:
        verifiers.submit(item(HANG, "5", request_id=11))
        killed: set[int] = set()
        for _ in range(2):
            wait_for(lambda: set(verifiers.metrics().worker_pids) - killed != set())
            time.sleep(0.3)  # the item goes to the new worker at once
            (pid,) = verifiers.metrics().worker_pids
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        request_id, reward = results.get(timeout=PATIENCE)
        assert (request_id, reward.verdict, reward.path) == (11, Verdict.SANDBOX_ERROR, "worker_died")
        assert reward.verdict.is_infrastructure_failure
        assert (verifiers.metrics().num_deaths, verifiers.metrics().num_kills) == (2, 0)


def test_a_hang_is_killed_at_its_deadline_and_delays_nobody():
    results: dict[int, Reward] = {}
    pool = PoolConfig(num_workers=2, deadline=3.0)
    with VerifierPool(RewardConfig(length_cache=20), pool, results.__setitem__) as verifiers:
        start = time.monotonic()
        verifiers.submit(item(HANG, "5", request_id=0))
        for request_id in range(1, 11):
            verifiers.submit(item("3", request_id=request_id))
        wait_for(lambda: len(results) >= 10)
        assert 0 not in results, "the others wait for the one that hangs"
        wait_for(lambda: len(results) == 11)
        assert 3.0 <= time.monotonic() - start < PATIENCE
        metrics = verifiers.metrics()
    assert {results[request_id].verdict for request_id in range(1, 11)} == {Verdict.CORRECT}
    hung = results[0]
    assert (hung.verdict, hung.path, hung.correctness) == (Verdict.TIMEOUT, "deadline", 0.0)
    assert (hung.format, hung.length, hung.language_note) == (0.1, -0.05, "consistent")
    assert hung.seconds >= 3.0
    assert (metrics.num_kills, metrics.num_deaths, metrics.num_graded, metrics.num_pending) == (1, 0, 11, 0)
    assert metrics.verdicts == {"correct": 10, "timeout": 1}
    assert metrics.languages == {"consistent": 11}


def test_waiting_in_the_queue_is_not_on_the_deadline():
    """Three hangs in a row on one worker: the last waits for two deadlines and still gets its own."""
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1, deadline=1.0)) as verifiers:
        *hung, last = verifiers.grade_all([item(HANG, "5"), item(HANG, "5"), item("3")])
        assert [reward.verdict for reward in hung] == [Verdict.TIMEOUT] * 2
        assert last.verdict is Verdict.CORRECT
        assert verifiers.metrics().queue_seconds > 2.5


def test_workers_are_recycled():
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1, recycle_after=3)) as verifiers:
        rewards = verifiers.grade_all([item("3")] * 10)
        assert {reward.verdict for reward in rewards} == {Verdict.CORRECT}
        metrics = verifiers.metrics()
        assert metrics.num_forks >= 4
        assert (metrics.num_kills, metrics.num_deaths) == (0, 0)


def test_cancelled_items_get_no_reward():
    results: dict[int, Reward] = {}
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1, deadline=PATIENCE), results.__setitem__) as verifiers:
        for request_id in range(5):
            verifiers.submit(item(HANG, "5", request_id))
        assert verifiers.cancel_all() == 5
        verifiers.submit(item("3", request_id=9))
        wait_for(lambda: 9 in results)
        assert list(results) == [9]
        assert (verifiers.metrics().num_cancelled, verifiers.metrics().num_pending) == (5, 0)


def test_close_settles_what_is_pending_and_leaves_no_process():
    results: dict[int, Reward] = {}
    verifiers = VerifierPool(RewardConfig(), PoolConfig(num_workers=2, deadline=PATIENCE), results.__setitem__)
    wait_for(lambda: len(verifiers.metrics().worker_pids) == 2)
    pids = verifiers.metrics().worker_pids
    verifiers.submit(item(HANG, "5", request_id=1))
    verifiers.close()
    verifiers.close()
    assert results[1].verdict is Verdict.SANDBOX_ERROR
    wait_for(lambda: not any(is_alive(pid) for pid in pids))
    with pytest.raises(MagistralError, match="closed"):
        verifiers.submit(item("3"))


PARENT = """if True:
    import time
    from magistral_jax.records import Problem
    from magistral_jax.verify.config import PoolConfig, RewardConfig
    from magistral_jax.verify.pool import VerifierPool, VerifyItem
    pool = VerifierPool(RewardConfig(), PoolConfig(num_workers=2), lambda *result: None)
    answer = r"<think>a</think> \\boxed{HANG}"
    pool.submit(VerifyItem(0, Problem("p", "s", "5"), answer, 1, 1, False))
    while len(pool.metrics().worker_pids) < 2:
        time.sleep(0.01)
    print(*pool.metrics().worker_pids, flush=True)
    time.sleep(1000)
"""


def test_no_worker_outlives_its_parent():
    """One worker idles and the other hangs in SymPy when the parent is killed."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", PARENT.replace("HANG", HANG)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_alive(pid) for pid in pids)
        parent.kill()
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_a_zygote_that_dies_is_replaced():
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1)) as verifiers:
        assert verifiers.grade_all([item("3")])[0].verdict is Verdict.CORRECT
        (worker,) = verifiers.metrics().worker_pids
        zygote = int(pathlib.Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(zygote, signal.SIGKILL)
        wait_for(lambda: not is_alive(worker))
        assert verifiers.grade_all([item("3")])[0].verdict is Verdict.CORRECT


def test_workers_that_cannot_start_are_an_error_with_their_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    (tmp_path / "sympy.py").write_text("raise ImportError('sympy is broken here')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(MagistralError, match="sympy is broken here"):
        VerifierPool(RewardConfig(), PoolConfig())


def test_too_little_memory_to_start_is_an_error_and_not_a_verdict():
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1, memory_mib=1)) as verifiers:
        with pytest.raises(MagistralError, match="die as they start"):
            verifiers.grade_all([item("3")])
        with pytest.raises(MagistralError, match="die as they start"):
            verifiers.grade_all([item("3")])


def test_an_error_in_the_callback_is_not_lost():
    def fail(request_id: int, reward: Reward) -> None:
        raise ValueError("callback broke")

    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1), fail) as verifiers:
        verifiers.submit(item("3"))

        def has_failed() -> bool:
            try:
                verifiers.submit(item("3"))
            except MagistralError as error:
                return "callback broke" in str(error)
            return False

        wait_for(has_failed)
