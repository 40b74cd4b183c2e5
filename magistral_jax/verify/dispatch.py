"""The loop of a verifier pool: gives jobs to workers, holds them to their deadlines, replaces the lost.

In: jobs, from an inbox. Out: a reward for each. Everything here runs on the pool's one thread, except `wake`.

Workers are started when a job needs one, up to `num_workers` of each kind; no more than `num_workers` are busy.
"""

import collections
import contextlib
import dataclasses
import logging
import selectors
import socket
import time

from magistral_jax.records import MagistralError, Reward, Verdict
from magistral_jax.verify.config import PoolConfig
from magistral_jax.verify.fleet import Fleet, Worker
from magistral_jax.verify.item import Message, encode_task
from magistral_jax.verify.ledger import Job, Ledger
from magistral_jax.verify.reward import UNGRADED, settle
from magistral_jax.verify.waiting import WaitingLine
from magistral_jax.verify.worker import WorkerConfig

_LOG = logging.getLogger(__name__)
_MAX_ATTEMPTS = 2
_MAX_FAILED_STARTS = 4
_MAX_BURIALS = 10  # of zygotes, without a worker that gets up between them


@dataclasses.dataclass(eq=False)
class _Seat:
    """A worker and what it is doing."""

    worker: Worker
    kind: str
    due: float  # when it has to have finished what it is doing
    pid: int = 0  # 0 until it is up
    job: Job | None = None  # with a worker that is up: it has been sent
    num_graded: int = 0


class Dispatcher:
    """Owns the fleet and the queue. `run` ends after `stop`, or with an error that ends the pool."""

    def __init__(self, workers: WorkerConfig, pool: PoolConfig, ledger: Ledger) -> None:
        self.inbox: collections.deque[Job] = collections.deque()
        self._sandbox = workers.mechanism.value
        self._config = pool
        self._ledger = ledger
        self._line = WaitingLine()
        self._fleet = Fleet(workers, pool.start_deadline)
        self._seats: list[_Seat] = []
        self._num_failed_starts = collections.Counter[str]()
        self._num_burials = 0
        self._last_words = ""
        self._seen_failures: set[str] = set()
        self._is_stopping = False
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers that are up."""
        return tuple(seat.pid for seat in tuple(self._seats) if seat.pid)

    def wake(self) -> None:
        """Make the loop look at its inbox. From any thread."""
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody is there
            self._wake_write.send(b"w")

    def stop(self) -> None:
        """Make `run` return soon. From any thread."""
        self._is_stopping = True
        self.wake()

    def run(self) -> None:
        """Serve until stopped."""
        while not self._is_stopping:
            while self.inbox:
                self._line.add(self.inbox.popleft())
            self._dispatch()
            for key, events in self._selector.select(self._seconds_left()):
                if key.data is None:
                    self._drain_wakes()
                elif key.data in self._seats:  # not dismissed a moment ago
                    self._serve(key.data, events)
            self._enforce_deadlines()

    def close(self) -> None:
        """End all processes."""
        self._selector.close()
        for seat in self._seats:
            seat.worker.connection.close()
        self._fleet.close()
        self._wake_read.close()
        self._wake_write.close()

    def abandon(self, job: Job, path: str) -> None:
        """Settle a job that no worker could grade: an infrastructure failure, with what is known of its form."""
        self._deliver(job, _failure(job, path))

    # ---- workers ----------------------------------------------------------------------------------------------------

    def _seat_for(self, kind: str) -> _Seat:
        """An idle worker of a kind, or a new one."""
        for seat in self._seats:
            if seat.kind == kind and seat.job is None:
                return seat
        if self._num_failed_starts[kind] >= _MAX_FAILED_STARTS:
            words = self._last_words or "no message"
            raise MagistralError(f"the verifier workers of kind {kind} die as they start: {words}")
        worker = self._fleet.fork(kind)
        seat = _Seat(worker, kind, due=time.monotonic() + self._config.start_deadline)
        self._seats.append(seat)
        self._selector.register(worker.connection, selectors.EVENT_READ, seat)
        self._ledger.count("num_forks")
        return seat

    def _bury(self) -> None:
        """The zygote is gone, and all workers with it, even if they do not look it: start anew."""
        for seat in tuple(self._seats):
            self._lose(seat)
        self._num_burials += 1
        if self._num_burials > _MAX_BURIALS:
            raise MagistralError(f"the process that starts the verifier workers dies: {self._fleet.last_words()}")
        self._fleet.restart()

    def _dismiss(self, seat: _Seat) -> None:
        """End a worker, whatever it is doing."""
        self._seats.remove(seat)
        self._selector.unregister(seat.worker.connection)
        self._fleet.kill(seat.worker)

    def _lose(self, seat: _Seat) -> None:
        """A worker is gone, or no good any more: its job goes to another."""
        self._dismiss(seat)
        if not seat.pid:
            self._num_failed_starts[seat.kind] += self._fleet.is_alive  # else it went with the zygote
            if seat.job:
                self._line.add_again(seat.job)
        elif seat.job:
            self._ledger.count("num_deaths")
            self._retry(seat.job, _failure(seat.job, "worker_died"))

    def _serve(self, seat: _Seat, events: int) -> None:
        """Go on with what a worker is sent, and hear what it says."""
        try:
            if events & selectors.EVENT_WRITE:
                seat.worker.flush()
                self._watch(seat)
            messages = seat.worker.receive()
        except (OSError, ValueError):
            messages = None
        if messages is None:
            self._lose(seat)
            return
        for message in messages:
            if seat not in self._seats:
                return
            if not _is_sound(message, seat):
                self._lose(seat)
                return
            self._hear(seat, message)

    def _hear(self, seat: _Seat, message: Message) -> None:
        job, reward = seat.job, message.reward
        if message.kind == "ready":
            seat.pid, seat.due = message.pid, float("inf")
            self._num_failed_starts[seat.kind] = self._num_burials = 0
            if job:
                self._hand_over(seat, job)
        elif message.kind == "failed":
            self._last_words = message.detail
        elif job and reward and message.kind == "form":
            job.form = reward
        elif job and reward and message.kind == "verdict":
            self._conclude(seat, job, reward, message)

    def _watch(self, seat: _Seat) -> None:
        """Wake up for what a worker says, and for its room for more while something is on its way."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if seat.worker.has_unsent else 0)
        if self._selector.get_key(seat.worker.connection).events != events:
            self._selector.modify(seat.worker.connection, events, seat)

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while sum(seat.job is not None for seat in self._seats) < self._config.num_workers:
            if not self._fleet.is_alive:
                self._bury()
            job = self._next_job()
            if job is None:
                return
            seat = self._seat_for(job.kind)
            seat.job = job
            if seat.pid:
                self._hand_over(seat, job)

    def _next_job(self) -> Job | None:
        while (job := self._line.take()) is not None:
            if self._ledger.is_pending(job):
                return job
        return None

    def _hand_over(self, seat: _Seat, job: Job) -> None:
        try:
            frame = encode_task(dataclasses.replace(job.task, serial=job.serial))
        except Exception as error:  # a column of the problem that is no data
            seat.job = None
            self._warn(f"a column of problem {job.item.problem.id!r} cannot be sent to a worker", str(error))
            self._deliver(job, _failure(job, type(error).__name__))
            return
        try:
            seat.worker.send(frame)
        except OSError:  # it died while it was idle, so the job has lost nothing
            self._dismiss(seat)
            self._line.add_again(job)
            return
        job.attempts += 1
        job.form, job.dispatched = None, time.monotonic()
        seat.due = job.dispatched + job.deadline
        self._watch(seat)

    def _conclude(self, seat: _Seat, job: Job, reward: Reward, message: Message) -> None:
        seat.job, seat.due = None, float("inf")
        seat.num_graded += 1
        if reward.verdict.is_infrastructure_failure:
            self._dismiss(seat)  # whatever is wrong with it must not meet the next job
            self._warn(reward.path, message.detail)
            self._retry(job, reward)
            return
        if seat.num_graded >= self._config.recycle_after or message.growth_mib > self._config.recycle_mib:
            self._dismiss(seat)
            self._ledger.count("num_recycles")
        job.explanation = message.explanation
        self._deliver(job, reward)

    def _retry(self, job: Job, failure: Reward) -> None:
        """Let another worker try, or report the failure where one has."""
        if job.attempts < _MAX_ATTEMPTS:
            self._ledger.count("num_retries")
            self._line.add_again(job)
        else:
            self._deliver(job, failure)

    def _deliver(self, job: Job, reward: Reward) -> None:
        self._line.graded(job)
        reward = dataclasses.replace(reward, sandbox=self._sandbox)
        if self._ledger.settle(job, reward):
            job.deliver(reward)

    def _warn(self, path: str, detail: str) -> None:
        if path not in self._seen_failures:
            self._seen_failures.add(path)
            _LOG.warning("grading fails with %s: %s (said once)", path, detail)

    # ---- time -------------------------------------------------------------------------------------------------------

    def _seconds_left(self) -> float | None:
        due = min((seat.due for seat in self._seats), default=float("inf"))
        return None if due == float("inf") else max(0.0, due - time.monotonic())

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for seat in tuple(self._seats):
            if seat.job and not self._ledger.is_pending(seat.job):  # cancelled
                self._dismiss(seat)
            elif seat.due <= now:
                self._expire(seat)

    def _expire(self, seat: _Seat) -> None:
        """A worker is over its time. Only where an answer is evaluated is that the answer's fault."""
        job = seat.job
        if not seat.pid or job is None:
            self._lose(seat)
            return
        self._dismiss(seat)
        self._ledger.count("num_kills")
        if job.kind == "math" and job.form:
            timed_out = settle(job.form, Verdict.TIMEOUT, "deadline", 0.0)
            self._deliver(job, dataclasses.replace(timed_out, seconds=time.monotonic() - job.dispatched))
        else:
            self._retry(job, _failure(job, "function:timeout" if job.kind == "function" else "deadline"))

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_read.recv(4096):
                pass


def _is_sound(message: Message, seat: _Seat) -> bool:
    """True where it is the worker's turn to say that. It has read untrusted text, so it may say anything."""
    match message.kind:
        case "ready" | "failed":
            return not seat.pid
        case "form" | "verdict":
            return seat.job is not None and message.serial == seat.job.serial and message.reward is not None
    return False


def _failure(job: Job, path: str) -> Reward:
    """An infrastructure failure, with what is known of the form."""
    return settle(job.form or UNGRADED, Verdict.SANDBOX_ERROR, path, 0.0)
