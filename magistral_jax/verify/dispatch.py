"""The loop of a verifier pool: gives jobs to workers, holds them to their deadlines, replaces the lost.

In: jobs, from an inbox. Out: a reward for each. Everything here runs on the pool's one thread, except `wake`.
"""

import collections
import contextlib
import dataclasses
import json
import selectors
import socket
import time
from typing import Any

from magistral_jax.records import MagistralError, Reward, Verdict
from magistral_jax.verify.config import PoolConfig, RewardConfig
from magistral_jax.verify.fleet import Fleet, Worker
from magistral_jax.verify.ledger import Job, Ledger
from magistral_jax.verify.reward import settle
from magistral_jax.verify.worker import decode_reward, encode_item

_MAX_ATTEMPTS = 2
_MAX_FAILED_STARTS = 3
_UNGRADED = Reward(Verdict.SANDBOX_ERROR, 0.0, 0.0, 0.0, 0.0, path="ungraded", seconds=0.0)


@dataclasses.dataclass(eq=False)
class _Seat:
    """A worker and what it is doing."""

    worker: Worker
    started: float
    pid: int = 0  # 0 until it is up
    job: Job | None = None
    num_graded: int = 0


class Dispatcher:
    """Owns the fleet and the queue. `run` ends after `stop`, or with an error that ends the pool."""

    def __init__(self, reward: RewardConfig, pool: PoolConfig, ledger: Ledger) -> None:
        self.inbox: collections.deque[Job] = collections.deque()
        self._reward = reward
        self._config = pool
        self._ledger = ledger
        self._fleet = Fleet(reward, pool)
        self._seats: list[_Seat] = []
        self._num_failed_starts = 0
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
            self._fill_seats()
            self._dispatch()
            for key, _ in self._selector.select(self._seconds_left()):
                if key.data is None:
                    self._drain_wakes()
                elif key.data in self._seats:  # not dismissed a moment ago
                    self._listen(key.data)
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
        self._deliver(job, dataclasses.replace(job.form or _UNGRADED, verdict=Verdict.SANDBOX_ERROR, path=path))

    # ---- workers ----------------------------------------------------------------------------------------------------

    def _fill_seats(self) -> None:
        while len(self._seats) < self._config.num_workers:
            if self._num_failed_starts >= _MAX_FAILED_STARTS:
                raise MagistralError(f"the verifier workers die as they start: {self._fleet.last_words()}")
            try:
                worker = self._fleet.fork()
            except OSError:  # the zygote is gone
                self._num_failed_starts += 1
                self._fleet.restart()
                continue
            seat = _Seat(worker, time.monotonic())
            self._seats.append(seat)
            self._selector.register(worker.connection, selectors.EVENT_READ, seat)
            self._ledger.count("num_forks")

    def _dismiss(self, seat: _Seat) -> Job | None:
        """End a worker; returns the job that it leaves behind."""
        self._seats.remove(seat)
        self._selector.unregister(seat.worker.connection)
        self._fleet.kill(seat.worker)
        return seat.job

    def _lose(self, seat: _Seat) -> None:
        """A worker is gone: its job goes to another once, and then no further."""
        job = self._dismiss(seat)
        self._num_failed_starts += not seat.pid
        if job is None:
            return
        self._ledger.count("num_deaths")
        if job.attempts < _MAX_ATTEMPTS:
            self.inbox.appendleft(job)
        else:
            self.abandon(job, "worker_died")

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        for seat in tuple(self._seats):
            if seat.pid and seat.job is None and (job := self._next_job()):
                seat.job, job.form = job, None
                job.attempts += 1
                job.dispatched = time.monotonic()
                try:
                    seat.worker.send(encode_item(job.item))
                except OSError:
                    self._lose(seat)
                    return  # others may be dead too: look before the job is risked again

    def _next_job(self) -> Job | None:
        while self.inbox:
            job = self.inbox.popleft()
            if self._ledger.is_pending(job):
                return job
        return None

    def _listen(self, seat: _Seat) -> None:
        lines = seat.worker.receive()
        if lines is None:
            self._lose(seat)
            return
        for line in lines:
            self._hear(seat, json.loads(line))

    def _hear(self, seat: _Seat, message: dict[str, Any]) -> None:
        if message["kind"] == "ready":
            seat.pid = message["pid"]
            self._num_failed_starts = 0
            return
        job = seat.job
        assert job is not None, "a worker speaks only about its job"
        reward = decode_reward(message["reward"])
        if message["kind"] == "form":
            job.form = reward
            return
        seat.job = None
        seat.num_graded += 1
        if seat.num_graded >= self._config.recycle_after:
            self._dismiss(seat)
        self._deliver(job, reward)

    def _deliver(self, job: Job, reward: Reward) -> None:
        if self._ledger.settle(job, reward):
            job.deliver(reward)

    # ---- time -------------------------------------------------------------------------------------------------------

    def _due(self, seat: _Seat) -> float:
        """When the worker has to have finished what it is doing."""
        if not seat.pid:
            return seat.started + self._config.start_deadline
        return seat.job.dispatched + self._config.deadline if seat.job else float("inf")

    def _seconds_left(self) -> float | None:
        if len(self._seats) < self._config.num_workers:
            return 0.0
        due = min((self._due(seat) for seat in self._seats), default=float("inf"))
        return None if due == float("inf") else max(0.0, due - time.monotonic())

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for seat in tuple(self._seats):
            job = seat.job
            if job and not self._ledger.is_pending(job):  # cancelled
                self._dismiss(seat)
            elif self._due(seat) <= now:
                self._ledger.count("num_kills")
                if job is None or job.form is None:  # even the cheap part hangs: that is not the answer's fault
                    self._lose(seat)
                    continue
                self._dismiss(seat)
                timed_out = settle(job.form, Verdict.TIMEOUT, "deadline", self._reward)
                self._deliver(job, dataclasses.replace(timed_out, seconds=now - job.dispatched))

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_read.recv(4096):
                pass
