"""Verifier pool: grades completions in worker processes that may hang, crash or eat memory without harm to the others.

In: `VerifyItem`s, from any thread. Out: one `Reward` for each, through a callback on the pool's thread, in the order in
which they are done. Invariants:
  - every item that is not cancelled gets exactly one reward;
  - the deadline of an item runs from its dispatch to a worker, so waiting in the queue never counts;
  - a worker's death is no verdict: the item goes once to another worker, then its verdict is `SANDBOX_ERROR`;
  - no process outlives the pool or the process that made it.
"""

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from magistral_jax.records import MagistralError, Reward
from magistral_jax.verify.config import PoolConfig, RewardConfig
from magistral_jax.verify.dispatch import Dispatcher
from magistral_jax.verify.ledger import Job, Ledger, PoolMetrics
from magistral_jax.verify.reward import check_kind
from magistral_jax.verify.worker import VerifyItem

__all__ = ["PoolMetrics", "VerifierPool", "VerifyItem"]


class VerifierPool:
    """A pool of verifier workers, usable as a context manager.

    Args:
      reward: Reward shaping.
      pool: Workers and their limits.
      on_result: Receives (request id, reward) of every submitted item, on the pool's thread. It should return soon; an
        exception from it ends the pool. Without it only `grade_all` can be used.

    Raises:
      MagistralError: The workers cannot start; the message holds what they wrote.
    """

    def __init__(
        self, reward: RewardConfig, pool: PoolConfig, on_result: Callable[[int, Reward], None] | None = None
    ) -> None:
        self._on_result = on_result
        self._ledger = Ledger()
        self._dispatcher = Dispatcher(reward, pool, self._ledger)
        self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
        self._thread.start()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, item: VerifyItem) -> None:
        """Queue an item; its reward goes to `on_result`.

        Raises:
          MagistralError: The problem is of a kind that cannot be verified, or the pool has failed or is closed.
        """
        if self._on_result is None:
            raise MagistralError("VerifierPool.submit needs on_result; use grade_all to wait for rewards")
        self._enqueue(Job(item, functools.partial(self._on_result, item.request_id), is_cancellable=True))

    def grade_all(self, items: Sequence[VerifyItem]) -> list[Reward]:
        """Grade the items and wait for all of them. Rewards come in the order of the items; request ids are not used.

        Raises:
          MagistralError: As `submit`.
        """
        for item in items:
            check_kind(item.problem)
        done: queue.SimpleQueue[tuple[int, Reward]] = queue.SimpleQueue()
        for index, item in enumerate(items):
            deliver = lambda reward, index=index: done.put((index, reward))
            self._enqueue(Job(item, deliver, is_cancellable=False))
        rewards = dict(done.get() for _ in items)
        self._ledger.check_open()
        return [rewards[index] for index in range(len(items))]

    def cancel_all(self) -> int:
        """Drop every submitted item without a reward and return their number.

        Afterwards no callback starts for them; one that runs at this moment may still end. `grade_all` is not affected.
        """
        num_cancelled = self._ledger.cancel()
        self._dispatcher.wake()
        return num_cancelled

    def metrics(self) -> PoolMetrics:
        """Counts and times since the pool was made."""
        return self._ledger.snapshot(self._dispatcher.worker_pids)

    def close(self) -> None:
        """End all processes. Items that are still pending get `SANDBOX_ERROR`: cancel them first if that matters."""
        self._dispatcher.stop()
        self._thread.join()

    def _enqueue(self, job: Job) -> None:
        check_kind(job.item.problem)
        self._ledger.open(job)
        self._dispatcher.inbox.append(job)
        self._dispatcher.wake()

    def _run(self) -> None:
        reason = "the verifier pool is closed"
        try:
            self._dispatcher.run()
        except Exception as error:
            reason = f"the verifier pool has failed: {error}"
        finally:
            self._dispatcher.close()
            for job in self._ledger.close(reason):
                with contextlib.suppress(Exception):  # one callback's error must not keep the others waiting
                    self._dispatcher.abandon(job, "pool_closed")
