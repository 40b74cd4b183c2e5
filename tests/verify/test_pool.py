"""The pool against hanging, dying and missing workers. Bounds on time are generous: the machine may be busy.

What hangs, crashes and eats memory is a reward function, which may do anything; `test_dispatch` has the finer rules.
"""

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
from magistral_jax.verify.config import PoolConfig, RewardConfig, SandboxConfig
from magistral_jax.verify.pool import VerifierPool, VerifyItem

WORDS = "We add the two numbers and look at the result for a moment. "
PATIENCE = 120.0
FAULTY = """
import ctypes, os, pathlib, socket, subprocess, sys, time

def score(completion, answer, **columns):
    deed = completion.splitlines()[-1]
    if "hang" in deed:
        while True:
            try:
                time.sleep(1)
            except BaseException:
                pass
    if "crash" in deed:
        ctypes.string_at(0)
    if "exit" in deed:
        os._exit(3)
    if "hog" in deed:
        hog = bytearray(2**31)
    if "raise" in deed:
        raise KeyError("a bug of the user")
    if "leave" in deed:
        sys.exit()
    if "spawn" in deed:
        subprocess.run(["/bin/true"])
    if "connect" in deed:
        socket.socket()
    if "write" in deed:
        pathlib.Path(__file__).with_name("written").write_text("")
    if "read" in deed:
        pathlib.Path("/etc/passwd").read_text()
    if "grow" in deed:
        columns.setdefault("kept", KEPT).append(os.urandom(30 * 2**20))
    return float(deed.strip() == answer)

KEPT = []
"""


def item(answer: str, reference: str = "3", request_id: int = 0) -> VerifyItem:
    problem = Problem("p", "What is the sum of one and two in this problem?", reference, extra={"not": {"sent"}})
    return VerifyItem(request_id, problem, f"<think>{WORDS}</think>{WORDS}\\boxed{{{answer}}}", 90, 100, False)


def deed(what: str, reference: str = "3", request_id: int = 0) -> VerifyItem:
    """An item for the faulty function."""
    return VerifyItem(
        request_id, Problem("p", WORDS, reference), f"<think>{WORDS}</think>{WORDS}\n{what}", 90, 100, False
    )


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


def both_pids(pool: VerifierPool) -> tuple[int, ...]:
    """Process ids of two workers, which start when there is work for both."""
    while len(pool.metrics().worker_pids) < 2:
        pool.grade_all([item("3")] * 20)
    return pool.metrics().worker_pids


def test_a_killed_worker_costs_nothing(patient: VerifierPool):
    """Both workers are stopped, so the items are with them when they are killed."""
    pids, before = both_pids(patient), patient.metrics()
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
    assert not set(pids) & set(both_pids(patient))
    assert patient.metrics().num_deaths == before.num_deaths + 2


def test_workers_that_were_killed_while_idle_cost_nothing_either(patient: VerifierPool):
    for _ in range(5):
        pids = both_pids(patient)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda pids=pids: not any(is_alive(pid) for pid in pids))
        assert patient.grade_all([item("3")])[0].verdict is Verdict.CORRECT


# ---- a user's function, which may do anything ----


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> RewardConfig:
    """A reward function that does what the completion says."""
    (tmp_path / "faulty_rewards.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return RewardConfig(function="faulty_rewards:score", length_cache=20)


@pytest.mark.parametrize(
    ("what", "path"),
    [
        ("hang", "function:timeout"),
        ("crash", "worker_died"),
        ("exit", "worker_died"),
        ("hog", "function:MemoryError"),
        ("raise", "function:KeyError"),
        ("leave", "function:SystemExit"),
    ],
)
def test_whatever_a_function_does_it_is_tried_twice_and_never_a_reward_of_zero(
    faulty: RewardConfig, what: str, path: str
):
    with VerifierPool(faulty, PoolConfig(num_workers=1, deadline=2.0)) as verifiers:
        before, reward, after = verifiers.grade_all([deed("3"), deed(what), deed("4")])
        metrics = verifiers.metrics()
    assert (before.verdict, after.verdict) == (Verdict.CORRECT, Verdict.WRONG)
    assert (reward.verdict, reward.path) == (Verdict.SANDBOX_ERROR, path)
    assert (reward.format, reward.length, reward.language_note) == (0.1, -0.05, "consistent")
    assert metrics.num_retries == 1
    assert metrics.verdicts == {"correct": 1, "wrong": 1, "sandbox_error": 1}


@pytest.mark.parametrize("what", ["spawn", "connect", "write", "read"])
def test_a_function_is_confined(faulty: RewardConfig, what: str):
    pool, sandbox = PoolConfig(num_workers=1), SandboxConfig("landlock")
    with VerifierPool(faulty, pool, sandbox=sandbox) as verifiers:
        fine, reward = verifiers.grade_all([deed("3"), deed(what)])
    assert fine.verdict is Verdict.CORRECT
    assert reward.verdict is Verdict.SANDBOX_ERROR
    assert reward.path in ("function:PermissionError", "function:BlockingIOError", "function:OSError")


def test_an_item_whose_workers_are_killed_twice_is_an_infrastructure_failure(faulty: RewardConfig):
    results: queue.Queue[tuple[int, Reward]] = queue.Queue()
    pool = PoolConfig(num_workers=1, deadline=PATIENCE)
    with VerifierPool(faulty, pool, lambda *result: results.put(result)) as verifiers:
        verifiers.submit(deed("hang", request_id=11))
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


def test_a_hang_delays_nobody(faulty: RewardConfig):
    results: dict[int, Reward] = {}
    pool = PoolConfig(num_workers=2, deadline=3.0)
    with VerifierPool(faulty, pool, results.__setitem__) as verifiers:
        verifiers.submit(deed("hang", request_id=0))
        for request_id in range(1, 11):
            verifiers.submit(deed("3", request_id=request_id))
        wait_for(lambda: len(results) >= 10)
        assert 0 not in results, "the others wait for the one that hangs"
        wait_for(lambda: len(results) == 11)
        metrics = verifiers.metrics()
    assert {results[request_id].verdict for request_id in range(1, 11)} == {Verdict.CORRECT}
    assert (metrics.num_kills, metrics.num_deaths, metrics.num_graded, metrics.num_pending) == (2, 0, 11, 0)
    assert metrics.languages == {"consistent": 11}


def test_waiting_in_the_queue_is_not_on_the_deadline(faulty: RewardConfig):
    """Hangs in a row on one worker: the last waits for several deadlines and still gets its own."""
    with VerifierPool(faulty, PoolConfig(num_workers=1, deadline=0.7)) as verifiers:
        *hung, last = verifiers.grade_all([deed("hang"), deed("hang"), deed("3")])
        assert [reward.path for reward in hung] == ["function:timeout"] * 2
        assert last.verdict is Verdict.CORRECT
        assert verifiers.metrics().queue_seconds > 2.5


def test_workers_are_recycled_by_age():
    with VerifierPool(RewardConfig(), PoolConfig(num_workers=1, recycle_after=3)) as verifiers:
        rewards = verifiers.grade_all([item("3")] * 10)
        assert {reward.verdict for reward in rewards} == {Verdict.CORRECT}
        metrics = verifiers.metrics()
    assert (metrics.num_forks, metrics.num_recycles) == (4, 3)
    assert (metrics.num_kills, metrics.num_deaths) == (0, 0)


def test_workers_are_recycled_by_memory(faulty: RewardConfig):
    """Each item leaks 30 MiB: the third is over 80, the sixth again."""
    with VerifierPool(faulty, PoolConfig(num_workers=1, recycle_mib=80)) as verifiers:
        rewards = verifiers.grade_all([deed("grow")] * 7)
        assert {reward.verdict for reward in rewards} == {Verdict.WRONG}
        assert verifiers.metrics().num_recycles == 2


def test_cancelled_items_get_no_reward(faulty: RewardConfig):
    results: dict[int, Reward] = {}
    with VerifierPool(faulty, PoolConfig(num_workers=1, deadline=PATIENCE), results.__setitem__) as verifiers:
        for request_id in range(5):
            verifiers.submit(deed("hang", request_id=request_id))
        assert verifiers.cancel_all() == 5
        verifiers.submit(deed("3", request_id=9))
        wait_for(lambda: 9 in results)
        assert list(results) == [9]
        assert (verifiers.metrics().num_cancelled, verifiers.metrics().num_pending) == (5, 0)


def test_close_settles_what_is_pending_and_leaves_no_process(faulty: RewardConfig):
    results: dict[int, Reward] = {}
    verifiers = VerifierPool(faulty, PoolConfig(num_workers=2, deadline=PATIENCE), results.__setitem__)
    verifiers.submit(deed("hang", request_id=1))
    verifiers.submit(deed("hang", request_id=2))
    wait_for(lambda: len(verifiers.metrics().worker_pids) == 2)
    pids = verifiers.metrics().worker_pids
    verifiers.close()
    verifiers.close()
    assert {results[request_id].path for request_id in (1, 2)} == {"pool_closed"}
    assert {results[request_id].verdict for request_id in (1, 2)} == {Verdict.SANDBOX_ERROR}
    wait_for(lambda: not any(is_alive(pid) for pid in pids))
    with pytest.raises(MagistralError, match="closed"):
        verifiers.submit(deed("3"))


def test_a_function_of_the_current_directory_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    (tmp_path / "local_rewards.py").write_text("def half(**columns): return 0.5")
    monkeypatch.chdir(tmp_path)
    with VerifierPool(RewardConfig(function="local_rewards:half"), PoolConfig(num_workers=1)) as verifiers:
        (reward,) = verifiers.grade_all([deed("anything")])
    assert (reward.verdict, reward.path, reward.correctness) == (Verdict.WRONG, "function", 0.45)


@pytest.mark.parametrize("path", ["no_such_module:score", "json:no_such_function", "json", "math:pi"])
def test_a_function_that_is_not_there_is_an_error_at_the_start(path: str):
    with pytest.raises(MagistralError, match=rf"`reward\.function` is `{path}`"):
        VerifierPool(RewardConfig(function=path), PoolConfig())


# ---- processes ----


PARENT = """if True:
    import time
    from magistral_jax.records import Problem
    from magistral_jax.verify.config import PoolConfig, RewardConfig
    from magistral_jax.verify.pool import VerifierPool, VerifyItem
    pool = VerifierPool(RewardConfig(function="faulty_rewards:score"), PoolConfig(num_workers=2), lambda *result: None)
    for _ in range(2):
        pool.submit(VerifyItem(0, Problem("p", "s", "5"), "<think>a</think>hang", 1, 1, False))
    while len(pool.metrics().worker_pids) < 2:
        time.sleep(0.01)
    print(*pool.metrics().worker_pids, flush=True)
    time.sleep(1000)
"""


def test_no_worker_outlives_its_parent(tmp_path: pathlib.Path):
    """Both workers hang when the parent is killed."""
    (tmp_path / "faulty_rewards.py").write_text(FAULTY)
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[2]), str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment) as parent:
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
