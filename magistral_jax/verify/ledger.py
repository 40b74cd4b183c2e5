"""The books of a verifier pool: which jobs are pending, and what became of the others. Safe to use from any thread."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable

from magistral_jax.records import MagistralError, Reward
from magistral_jax.verify.worker import VerifyItem


@dataclasses.dataclass(frozen=True)
class PoolMetrics:
    """Counts and sums since the pool was made. Means are the sums over `num_graded`."""

    num_submitted: int = 0
    """Items taken in."""
    num_graded: int = 0
    """Rewards delivered, infrastructure failures included."""
    num_cancelled: int = 0
    """Items dropped by `cancel_all`."""
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
    num_forks: int = 0
    """Workers started; more than the pool's size where some were replaced."""
    verdicts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Delivered rewards by verdict; "timeout" and "sandbox_error" are among them."""
    languages: dict[str, int] = dataclasses.field(default_factory=dict)
    """Delivered rewards by language outcome, where the language was looked at."""
    worker_pids: tuple[int, ...] = ()
    """Process ids of the workers that are up."""


@dataclasses.dataclass(eq=False)
class Job:
    """An item on its way through the pool."""

    item: VerifyItem
    deliver: Callable[[Reward], None]
    is_cancellable: bool
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    dispatched: float = 0.0
    attempts: int = 0
    form: Reward | None = None
    """What the worker knew before it began to grade the answer."""


class Ledger:
    """Pending jobs, counts and sums, behind one lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[Job, None] = {}  # an ordered set
        self._counts = collections.Counter[str]()
        self._seconds = {"queue_seconds": 0.0, "verify_seconds": 0.0}
        self._verdicts = collections.Counter[str]()
        self._languages = collections.Counter[str]()
        self._closed_because: str | None = None

    def open(self, job: Job) -> None:
        """Enter a job. Raises `MagistralError` once the ledger is closed."""
        with self._lock:
            if self._closed_because is not None:
                raise MagistralError(self._closed_because)
            self._pending[job] = None
            self._counts["num_submitted"] += 1

    def is_pending(self, job: Job) -> bool:
        """False once the job is settled or cancelled."""
        return job in self._pending

    def settle(self, job: Job, reward: Reward) -> bool:
        """Book the reward of a job. False where the job was cancelled and nobody waits for it."""
        with self._lock:
            if job not in self._pending:
                return False
            del self._pending[job]
            self._counts["num_graded"] += 1
            if job.dispatched:
                self._seconds["queue_seconds"] += job.dispatched - job.submitted
                self._seconds["verify_seconds"] += time.monotonic() - job.dispatched
            self._verdicts[reward.verdict.value] += 1
            if reward.language_note:
                self._languages[reward.language_note] += 1
            return True

    def cancel(self) -> int:
        """Take out every job that may be cancelled, and return their number."""
        with self._lock:
            cancelled = [job for job in self._pending if job.is_cancellable]
            for job in cancelled:
                del self._pending[job]
            self._counts["num_cancelled"] += len(cancelled)
            return len(cancelled)

    def close(self, reason: str) -> list[Job]:
        """Take no more jobs, and return those that are pending."""
        with self._lock:
            self._closed_because = reason
            return list(self._pending)

    def check_open(self) -> None:
        """Raise `MagistralError` with the reason where the ledger is closed."""
        if self._closed_because is not None:
            raise MagistralError(self._closed_because)

    def count(self, name: str) -> None:
        """Add one to a count of `PoolMetrics`."""
        with self._lock:
            self._counts[name] += 1

    def snapshot(self, worker_pids: tuple[int, ...]) -> PoolMetrics:
        """The books as they stand."""
        with self._lock:
            return PoolMetrics(
                num_submitted=self._counts["num_submitted"],
                num_graded=self._counts["num_graded"],
                num_cancelled=self._counts["num_cancelled"],
                num_pending=len(self._pending),
                num_running=sum(job.attempts > 0 for job in self._pending),
                queue_seconds=self._seconds["queue_seconds"],
                verify_seconds=self._seconds["verify_seconds"],
                num_kills=self._counts["num_kills"],
                num_deaths=self._counts["num_deaths"],
                num_forks=self._counts["num_forks"],
                verdicts=dict(self._verdicts),
                languages=dict(self._languages),
                worker_pids=worker_pids,
            )
