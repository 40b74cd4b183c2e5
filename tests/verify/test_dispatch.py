"""The rules of the pool, with workers that are threads of the test and do what a script says."""

import contextlib
import dataclasses
import functools
import io
import itertools
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from magistral_jax.records import MagistralError, Problem, Reward, Verdict
from magistral_jax.verify.code_tests import CodeTests
from magistral_jax.verify.config import PoolConfig, RewardConfig
from magistral_jax.verify.fleet import Worker
from magistral_jax.verify.item import Message, Task, VerifyItem, encode_message, read_task
from magistral_jax.verify.pool import VerifierPool
from magistral_jax.verify.sandbox.mechanism import Mechanism

PATIENCE = 60.0
FORM = Reward(Verdict.SANDBOX_ERROR, 0.1, 0.0, -0.05, 0.1, "unsettled", 0.0, "consistent")
GRADED = dataclasses.replace(FORM, verdict=Verdict.CORRECT, correctness=0.9, path="fake")
TESTS = {"tests": [{"input": "1", "output": "2"}]}

Say = Callable[[Message], None]
Script = Callable[[Task, Say], None]  # what a worker does with a task; an exception ends the worker


def correct(task: Task, say: Say) -> None:
    say(Message("form", FORM))
    say(Message("verdict", dataclasses.replace(GRADED, path=task.item.completion)))


def item(name: str = "", request_id: int = 0, kind: Any = "math", **fields: Any) -> VerifyItem:
    extra = TESTS if kind == "code" else {}
    return VerifyItem(request_id, Problem("p", "s", "a", kind=kind, extra=extra), name, 1, 1, False, **fields)


class FakeFleet:
    """Workers that are threads. `script` may be changed while they run."""

    script: Script = staticmethod(correct)

    def __init__(self) -> None:
        self.forked: list[str] = []
        self.killed: list[int] = []
        self.is_reading = threading.Event()
        self.is_reading.set()

    def __call__(self, *config: Any) -> "FakeFleet":
        return self

    def fork(self, kind: str) -> Worker:
        ours, theirs = socket.socketpair()
        worker = Worker(len(self.forked), ours)
        self.forked.append(kind)
        threading.Thread(target=self._work, args=(worker.number, theirs), daemon=True).start()
        return worker

    def _work(self, number: int, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as tasks, contextlib.suppress(OSError, ValueError):  # killed
            self._talk(number, connection, tasks)

    def _talk(self, number: int, connection: socket.socket, tasks: io.BufferedIOBase) -> None:
        say = lambda message: connection.sendall(encode_message(message))
        say(Message("ready", pid=number + 1))
        self.is_reading.wait(PATIENCE)
        while (task := read_task(tasks)) is not None:
            self.script(task, lambda message, serial=task.serial: say(dataclasses.replace(message, serial=serial)))

    def kill(self, worker: Worker) -> None:
        self.killed.append(worker.number)
        worker.connection.close()

    is_alive = True
    num_restarts = 0

    def last_words(self) -> str:
        return "no words"

    def restart(self) -> None:
        self.num_restarts += 1
        self.is_alive = True

    def close(self) -> None:
        pass


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> FakeFleet:
    fleet = FakeFleet()
    monkeypatch.setattr("magistral_jax.verify.dispatch.Fleet", fleet)
    monkeypatch.setattr("magistral_jax.verify.pool.choose_mechanism", lambda wanted: Mechanism.LANDLOCK)
    return fleet


def make_pool(
    on_result: Callable[[int, Reward], None] | None = None, *, function: str = "", **config: Any
) -> VerifierPool:
    return VerifierPool(RewardConfig(function=function), PoolConfig(**config), on_result)


class Gate:
    """A script that waits until the test lets it go on; notes the order in which items are taken."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.arrived = threading.Semaphore(0)
        self._passes = threading.Semaphore(0)

    def __call__(self, task: Task, say: Say) -> None:
        self.taken.append(task.item.completion)
        self.arrived.release()
        if self._passes.acquire(timeout=PATIENCE):
            correct(task, say)

    def open(self, count: int) -> None:
        self._passes.release(count)


# ---- who goes first, and where ----


def test_the_group_that_is_nearest_to_its_end_goes_first(fleet: FakeFleet):
    fleet.script = gate = Gate()
    with make_pool(lambda *result: None, num_workers=1) as pool:
        pool.submit(item("a1", group=1, group_size=2))
        assert gate.arrived.acquire(timeout=PATIENCE)
        for name, group in (("b1", 2), ("b2", 2), ("c1", 3), ("a2", 1)):
            pool.submit(item(name, group=group, group_size=2))
        gate.open(5)
        for _ in range(4):
            assert gate.arrived.acquire(timeout=PATIENCE)
    assert gate.taken == ["a1", "a2", "b1", "b2", "c1"]


def test_each_kind_has_its_workers_and_no_more_than_the_limit_are_busy(fleet: FakeFleet):
    fleet.script = gate = Gate()
    with make_pool(lambda *result: None, num_workers=2) as pool:
        for name, kind in (("1", "math"), ("2", "code"), ("3", "code"), ("4", "code"), ("5", "math"), ("6", "math")):
            pool.submit(item(name, kind=kind))
        for _ in range(2):
            assert gate.arrived.acquire(timeout=PATIENCE)
        assert not gate.arrived.acquire(timeout=0.2), "a third worker is busy"
        gate.open(6)
        for _ in range(4):
            assert gate.arrived.acquire(timeout=PATIENCE)
    assert sorted(gate.taken) == ["1", "2", "3", "4", "5", "6"]
    assert set(fleet.forked) == {"math", "code"}
    assert pool.metrics().kinds == {"math": 3, "code": 3}


def test_a_worker_that_is_gone_makes_room_for_another(fleet: FakeFleet):
    with make_pool(num_workers=2, recycle_after=1) as pool:
        pool.grade_all([item(kind="code")] * 6)
    assert fleet.forked == ["code"] * 6


def test_a_function_grades_problems_of_every_kind(fleet: FakeFleet):
    with make_pool(function="a:b", num_workers=1) as pool:
        pool.grade_all([item(), item(kind="code")])
    assert fleet.forked == ["function"]


# ---- deadlines and failures ----


def stuck(task: Task, say: Say) -> None:
    say(Message("form", FORM))
    threading.Event().wait(PATIENCE)


def test_a_math_answer_that_hangs_keeps_its_form(fleet: FakeFleet):
    fleet.script = stuck
    with make_pool(num_workers=1, deadline=0.2) as pool:
        (reward,) = pool.grade_all([item()])
        metrics = pool.metrics()
    assert (reward.verdict, reward.path, reward.correctness) == (Verdict.TIMEOUT, "deadline", 0.0)
    assert (reward.format, reward.length, reward.language, reward.language_note) == (0.1, -0.05, 0.1, "consistent")
    assert reward.seconds >= 0.2
    assert (metrics.num_kills, metrics.num_retries, metrics.num_deaths) == (1, 0, 0)


def test_a_function_that_hangs_is_tried_again_and_then_reported(fleet: FakeFleet):
    fleet.script = stuck
    with make_pool(function="a:b", num_workers=1, deadline=0.2) as pool:
        (reward,) = pool.grade_all([item()])
        metrics = pool.metrics()
    assert (reward.verdict, reward.path, reward.format) == (Verdict.SANDBOX_ERROR, "function:timeout", 0.1)
    assert (metrics.num_kills, metrics.num_retries) == (2, 1)
    assert metrics.verdicts == {"sandbox_error": 1}


def test_the_deadline_of_a_program_is_beyond_all_its_limits(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch):
    """So it is the box that is broken when it passes, and not the program that is slow."""
    monkeypatch.setattr(CodeTests, "longest_run", lambda self, config: 0.4)
    fleet.script = stuck
    with make_pool(num_workers=2, deadline=0.1) as pool:
        (reward,) = pool.grade_all([item(kind="code")])
        assert pool.metrics().verify_seconds >= 0.5
    assert (reward.verdict, reward.path) == (Verdict.SANDBOX_ERROR, "deadline")


def test_an_infrastructure_failure_goes_to_another_worker_once(fleet: FakeFleet, caplog: pytest.LogCaptureFixture):
    calls = itertools.count()

    def fail_at_first(task: Task, say: Say, num_failures: int) -> None:
        failed = next(calls) < num_failures
        reward = dataclasses.replace(FORM, path="BoxError") if failed else GRADED
        say(Message("verdict", reward, detail="the box broke" if failed else ""))

    fleet.script = functools.partial(fail_at_first, num_failures=1)
    with make_pool(num_workers=1) as pool:
        assert pool.grade_all([item()])[0].verdict is Verdict.CORRECT
        assert (len(fleet.forked), pool.metrics().num_retries) == (2, 1)
        calls = itertools.count()
        fleet.script = functools.partial(fail_at_first, num_failures=2)
        (reward,) = pool.grade_all([item()])
    assert (reward.verdict, reward.path, reward.format) == (Verdict.SANDBOX_ERROR, "BoxError", 0.1)
    assert [record.message for record in caplog.records] == ["grading fails with BoxError: the box broke (said once)"]


@pytest.mark.parametrize(
    "junk",
    [b"hello\n", b"{}\n", b"[]\n", b'{"kind": "verdict", "reward": null}\n', b'{"kind": "form", "reward": {}}\n'],
)
def test_a_worker_that_talks_nonsense_is_replaced(fleet: FakeFleet, junk: bytes):
    """It has read untrusted text: whoever took it over must not take the pool with it."""
    calls = itertools.count()

    def talk(number: int, connection: socket.socket, tasks: io.BufferedIOBase) -> None:
        connection.sendall(encode_message(Message("ready", pid=1)))
        task = read_task(tasks)
        assert task is not None
        if next(calls) == 0:
            connection.sendall(junk)
            threading.Event().wait(PATIENCE)
        say = lambda message: connection.sendall(encode_message(dataclasses.replace(message, serial=task.serial)))
        correct(task, say)

    fleet._talk = talk  # pyright: ignore[reportPrivateUsage]
    with make_pool(num_workers=1) as pool:
        assert pool.grade_all([item()])[0].verdict is Verdict.CORRECT


def test_a_job_is_not_risked_with_workers_whose_zygote_is_gone(fleet: FakeFleet):
    """They are about to die too, and a second death would be held against the job."""
    is_doomed = threading.Event()

    def die(task: Task, say: Say) -> None:
        if task.item.completion == "last words" and fleet.num_restarts == 0:
            fleet.is_alive = False
            is_doomed.set()
        if is_doomed.is_set() and fleet.num_restarts == 0:
            raise OSError
        correct(task, say)

    fleet.script = die
    with make_pool(num_workers=2) as pool:
        pool.grade_all([item()] * 20)
        pool.grade_all([item("last words")])
        metrics = pool.metrics()
    assert fleet.num_restarts == 1
    assert metrics.verdicts == {"correct": 21}
    assert (metrics.num_deaths, metrics.num_retries) == (1, 1)


@pytest.mark.parametrize("kind", ["math", "code"])
def test_workers_that_die_as_they_start_are_an_error_in_the_end(fleet: FakeFleet, kind: str):
    def talk(number: int, connection: socket.socket, tasks: io.BufferedIOBase) -> None:
        connection.sendall(encode_message(Message("failed", detail="there is no compiler")))

    fleet._talk = talk  # pyright: ignore[reportPrivateUsage]
    with (
        make_pool(num_workers=2) as pool,
        pytest.raises(MagistralError, match=f"of kind {kind} die as they start: there is no compiler"),
    ):
        pool.grade_all([item(kind=kind)])


def test_a_zygote_that_always_dies_is_an_error_in_the_end(fleet: FakeFleet):
    fleet.is_alive = False
    fleet.restart = lambda: None
    with make_pool() as pool, pytest.raises(MagistralError, match="starts the verifier workers dies: no words"):
        pool.grade_all([item()])


def test_a_verdict_nobody_asked_for_is_not_heard(fleet: FakeFleet):
    def answer_twice(task: Task, say: Say) -> None:
        correct(task, say)
        say(Message("verdict", dataclasses.replace(GRADED, path="again")))

    fleet.script = answer_twice
    with make_pool(num_workers=1) as pool:
        rewards = pool.grade_all([item("first"), item("second"), item("third")])
    assert [reward.path for reward in rewards] == ["first", "second", "third"]


def test_a_worker_that_grew_is_replaced(fleet: FakeFleet):
    def grow(task: Task, say: Say) -> None:
        say(Message("verdict", GRADED, growth_mib=float(task.item.completion)))

    fleet.script = grow
    with make_pool(num_workers=1, recycle_mib=100) as pool:
        pool.grade_all([item("10"), item("100"), item("101"), item("5"), item("200")])
        metrics = pool.metrics()
    assert (metrics.num_recycles, metrics.num_forks) == (2, 2)


def test_a_column_that_is_no_data_is_an_error_of_its_item_only(fleet: FakeFleet):
    problem = Problem("p", "s", "a", extra={"lock": threading.Lock()})
    with make_pool(function="a:b", num_workers=1) as pool:
        bad, good = pool.grade_all([VerifyItem(0, problem, "", 1, 1, False), item()])
    assert (bad.verdict, bad.path) == (Verdict.SANDBOX_ERROR, "TypeError")
    assert good.verdict is Verdict.CORRECT


def test_a_worker_that_does_not_read_holds_nobody_up(fleet: FakeFleet):
    """A completion larger than any socket's buffer waits for a reader, while others are graded."""
    results: queue.Queue[int] = queue.Queue()
    with make_pool(lambda request_id, reward: results.put(request_id), num_workers=2) as pool:
        fleet.is_reading.clear()
        pool.submit(item("x" * 30_000_000, request_id=0))
        while pool.metrics().num_running < 1:
            pass
        fleet.is_reading = threading.Event()  # later workers read
        fleet.is_reading.set()
        for request_id in range(1, 20):
            pool.submit(item(request_id=request_id))
        assert sorted(results.get(timeout=PATIENCE) for _ in range(19)) == list(range(1, 20))
        assert results.empty()


# ---- backpressure ----


def test_who_submits_too_much_waits(fleet: FakeFleet):
    fleet.script = gate = Gate()
    with make_pool(lambda *result: None, num_workers=1, max_pending=2) as pool:
        pool.submit(item())
        pool.submit(item())
        late = threading.Thread(target=pool.submit, args=(item(),))
        late.start()
        late.join(0.2)
        assert late.is_alive()
        assert pool.metrics().num_pending == 2
        gate.open(1)
        late.join(PATIENCE)
        assert not late.is_alive()
        gate.open(2)


def test_closing_wakes_who_waits_with_an_error(fleet: FakeFleet):
    fleet.script = Gate()
    pool = make_pool(lambda *result: None, num_workers=1, max_pending=1)
    pool.submit(item())
    errors: list[str] = []

    def submit() -> None:
        try:
            pool.submit(item())
        except MagistralError as error:
            errors.append(str(error))

    late = threading.Thread(target=submit)
    late.start()
    pool.close()
    late.join(PATIENCE)
    assert errors == ["the verifier pool is closed"]


def test_a_callback_may_submit_even_when_there_is_no_room(fleet: FakeFleet):
    done = threading.Event()

    def on_result(request_id: int, reward: Reward) -> None:
        if request_id < 5:
            pool.submit(item(request_id=request_id + 1))
            pool.submit(item(request_id=100))
        if request_id == 5:
            done.set()

    with make_pool(on_result, num_workers=1, max_pending=1) as pool:
        pool.submit(item(request_id=0))
        assert done.wait(PATIENCE)


# ---- streams ----


def endless(pulled: list[int]) -> Iterator[VerifyItem]:
    for number in itertools.count():
        pulled.append(number)
        yield item(str(number))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stream_pulls_no_further_than_it_must(fleet: FakeFleet, ordered: bool):
    pulled: list[int] = []
    with make_pool(num_workers=2, max_pending=16) as pool:
        stream = pool.grade_stream(endless(pulled), ordered=ordered)
        assert pulled == []
        got = dict(itertools.islice(stream, 1000))
        assert {index: reward.path for index, reward in got.items()} == {index: str(index) for index in got}
        assert len(got) == 1000
        assert len(pulled) <= 1000 + 16
        if ordered:
            assert list(got) == list(range(1000))
        stream.close()


def test_closing_a_stream_cancels_its_items_and_no_others(fleet: FakeFleet):
    fleet.script = gate = Gate()
    results: queue.Queue[int] = queue.Queue()
    with make_pool(lambda request_id, reward: results.put(request_id), num_workers=1, max_pending=8) as pool:
        stream = pool.grade_stream(endless([]))
        gate.open(1)
        next(stream)
        other = threading.Thread(target=pool.submit, args=(item(request_id=7),))  # there is no room for it yet
        other.start()
        stream.close()
        other.join(PATIENCE)
        gate.open(2)  # a worker whose item was cancelled takes one with it
        assert results.get(timeout=PATIENCE) == 7
        metrics = pool.metrics()
    assert (metrics.num_graded, metrics.num_pending) == (2, 0)
    assert metrics.num_cancelled >= 1


def test_a_slow_source_does_not_hold_back_what_is_done(fleet: FakeFleet):
    got: list[int] = []

    def slow() -> Iterator[VerifyItem]:
        yield item()
        while pool.metrics().num_graded < 1:
            time.sleep(0.01)
        time.sleep(0.1)  # from the books to the stream
        yield item()
        assert 0 in got, "the stream asks for more before it yields what it has"

    with make_pool(num_workers=1) as pool:
        for index, _ in pool.grade_stream(slow()):
            got.append(index)
    assert got == [0, 1]


def test_a_source_that_fails_ends_the_stream_with_its_error(fleet: FakeFleet):
    def broken() -> Iterator[VerifyItem]:
        yield item()
        raise KeyError("source")

    with make_pool(num_workers=1) as pool:
        with pytest.raises(KeyError, match="source"):
            list(pool.grade_stream(broken()))
        assert pool.metrics().num_pending == 0


def test_a_malformed_problem_is_said_to_who_submits_it(fleet: FakeFleet):
    problem = Problem("q7", "s", "", kind="code", extra={"tests": "nonsense"})
    with make_pool(num_workers=1) as pool, pytest.raises(MagistralError, match="q7"):
        pool.grade_all([item(), VerifyItem(0, problem, "", 1, 1, False)])


# ---- the record ----


def test_every_reward_says_what_confined_its_verifier(fleet: FakeFleet):
    with make_pool(num_workers=1) as pool:
        assert pool.grade_all([item()])[0].sandbox == "landlock"


def test_an_explanation_comes_with_its_reward(fleet: FakeFleet):
    def explain(task: Task, say: Say) -> None:
        say(Message("verdict", GRADED, explanation={"asked": task.is_explained}))

    fleet.script = explain
    with make_pool(num_workers=1) as pool:
        reward, explanation = pool.explain(item())
    assert reward.verdict is Verdict.CORRECT
    assert explanation == {"asked": True}
