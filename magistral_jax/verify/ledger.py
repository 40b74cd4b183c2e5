"""The books of a verifier pool: which jobs are pending, and what became of the others. Safe to use from any thread."""

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from magistral_jax.records import MagistralError, Reward
from magistral_jax.verify.item import Task, VerifyItem


@dataclasses.dataclass(frozen=True)
class PoolMetrics:
    """Counts and sums since the pool was made. Means are the sums over `num_graded`."""

    num_submitted: int = 0
    """Items taken in."""
    num_graded: int = 0
    """Rewards delivered, infrastructure failures included."""
    num_cancelled: int = 0
    """Items dropped without a reward."""
    num_pending: int = 0
    """Items that wait or are being graded now."""
    num_running: int = 0
    """Pending items that a worker has taken at least once."""
    queue_seconds: float = 0.0
    """Sum over delivered rewards of the time from submission to the last dispatch."""
    verify_seconds: float = 0.0
    """Sum over delivered rewards of the time from the last dispatch to the verdict."""
    num_kills: int = 0
    """Workers killed because their item was over its deadline."""
    num_deaths: int = 0
    """Workers that died by themselves while they graded."""
    num_retries: int = 0
    """Items that went to a second worker because the first failed on them."""
    num_recycles: int = 0
    """Workers replaced for their age or their memory."""
    num_forks: int = 0
    """Workers started."""
    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    """Delivered rewards by what graded: "math", "code" or "function"."""
    verdicts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Delivered rewards by verdict; "timeout" and "sandbox_error" are among them."""
    languages: dict[str, int] = dataclasses.field(default_factory=dict)
    """Delivered rewards by language outcome, where the language was looked at."""
    worker_pids: tuple[int, ...] = ()
    """Process ids of the workers that are up."""


@dataclasses.dataclass(eq=False)
class Job:
    """An item on its way through the pool."""

    task: Task
    kind: str
    """What grades it: "math", "code" or "function"."""
    deadline: float
    """Seconds from dispatch until the worker is killed."""
    deliver: Callable[[Reward], None]
    owner: object
    """Who may cancel it."""
    serial: int = 0
    submitted: float = 0.0
    dispatched: float = 0.0
    attempts: int = 0
    form: Reward | None = None
    """What the worker knew before it began to grade the answer."""
    explanation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def item(self) -> VerifyItem:
        """What is graded."""
        return self.task.item


class Ledger:
    """Pending jobs, counts and sums, behind one lock."""

    def __init__(self, max_pending: int) -> None:
        self._changed = threading.Condition()
        self._max_pending = max_pending
        self._serials = itertools.count(1)
        self._pending: dict[Job, None] = {}  # an ordered set
        self._counts = collections.Counter[str]()
        self._queue_seconds = self._verify_seconds = 0.0
        self._kinds = collections.Counter[str]()
        self._verdicts = collections.Counter[str]()
        self._languages = collections.Counter[str]()
        self._closed_because: str | None = None

    def open(self, job: Job, *, may_wait: bool) -> None:
        """Enter a job, once there is room for it; where waiting is not allowed, at once.

        Raises:
          MagistralError: The ledger is closed, or is closed while this waits.
        """
        with self._changed:
            if may_wait:
                self._changed.wait_for(lambda: len(self._pending) < self._max_pending or not self._is_open)
            self.check_open()
            job.serial, job.submitted = next(self._serials), time.monotonic()
            self._pending[job] = None
            self._counts["num_submitted"] += 1

    def is_pending(self, job: Job) -> bool:
        """False once the job is settled or cancelled."""
        return job in self._pending

    def settle(self, job: Job, reward: Reward) -> bool:
        """Book the reward of a job. False where the job was cancelled and nobody waits for it."""
        with self._changed:
            if job not in self._pending:
                return False
            del self._pending[job]
            self._changed.notify()
            self._counts["num_graded"] += 1
            if job.dispatched:
                self._queue_seconds += job.dispatched - job.submitted
                self._verify_seconds += time.monotonic() - job.dispatched
            self._kinds[job.kind] += 1
            self._verdicts[reward.verdict.value] += 1
            if reward.language_note:
                self._languages[reward.language_note] += 1
            return True

    def cancel(self, owner: object) -> int:
        """Take out every job of an owner, and return their number."""
        with self._changed:
            cancelled = [job for job in self._pending if job.owner is owner]
            for job in cancelled:
                del self._pending[job]
            self._changed.notify_all()
            self._counts["num_cancelled"] += len(cancelled)
            return len(cancelled)

    def close(self, reason: str) -> list[Job]:
        """Take no more jobs, and return those that are pending."""
        with self._changed:
            self._closed_because = reason
            self._changed.notify_all()
            return list(self._pending)

    def check_open(self) -> None:
        """Raise `MagistralError` with the reason where the ledger is closed."""
        if self._closed_because is not None:
            raise MagistralError(self._closed_because)

    def count(self, name: str) -> None:
        """Add one to a count of `PoolMetrics`."""
        with self._changed:
            self._counts[name] += 1

    def snapshot(self, worker_pids: tuple[int, ...]) -> PoolMetrics:
        """The books as they stand."""
        with self._changed:
            return PoolMetrics(
                **self._counts,
                queue_seconds=self._queue_seconds,
                verify_seconds=self._verify_seconds,
                num_pending=len(self._pending),
                num_running=sum(job.attempts > 0 for job in self._pending),
                kinds=dict(self._kinds),
                verdicts=dict(self._verdicts),
                languages=dict(self._languages),
                worker_pids=worker_pids,
            )

    @property
    def _is_open(self) -> bool:
        return self._closed_because is None
