"""Verifier pool: grades completions in worker processes that may hang, crash or eat memory without harm to the others.

In: `VerifyItem`s, from any thread. Out: one `Reward` for each, through a callback on the pool's thread in the order in
which they are done, or as a stream. Invariants:
  - every item that is not cancelled gets exactly one reward;
  - what evaluates untrusted text or programs is confined by the sandbox, and every reward says by which;
  - the deadline of an item runs from its dispatch to a worker, so waiting in the queue never counts;
  - a worker's death is no verdict: the item goes once to another worker, then its verdict is `SANDBOX_ERROR`. So it is
    with an exception or a hang of a user's own function, and with a program's box that breaks;
  - no process outlives the pool or the process that made it.
"""

import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from types import TracebackType
from typing import Any

from magistral_jax.records import MagistralError, Reward
from magistral_jax.verify.code_tests import select_tests
from magistral_jax.verify.config import CodeConfig, PoolConfig, RewardConfig, SandboxConfig
from magistral_jax.verify.dispatch import Dispatcher
from magistral_jax.verify.item import Task, VerifyItem
from magistral_jax.verify.ledger import Job, Ledger, PoolMetrics
from magistral_jax.verify.sandbox.mechanism import choose_mechanism
from magistral_jax.verify.worker import WorkerConfig

__all__ = ["PoolMetrics", "VerifierPool", "VerifyItem"]

_STREAM_WINDOW = 128
"""Items of a stream that are under way, for each worker."""


class VerifierPool:
    """A pool of verifier workers, usable as a context manager.

    Args:
      reward: Reward shaping.
      pool: Workers and their limits.
      on_result: Receives (request id, reward) of every submitted item, on the pool's thread. It should return soon; an
        exception from it ends the pool. Without it only `grade_all` and `grade_stream` can be used.
      code: Verification of programs.
      sandbox: What confines workers and programs.

    Raises:
      MagistralError: The sandbox does not hold (`SandboxUnavailable`), the own reward function cannot be imported, or
        the workers cannot start; the message says why.
    """

    def __init__(
        self,
        reward: RewardConfig,
        pool: PoolConfig,
        on_result: Callable[[int, Reward], None] | None = None,
        *,
        code: CodeConfig = CodeConfig(),  # noqa: B008 (frozen)
        sandbox: SandboxConfig = SandboxConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self._on_result = on_result
        self._reward, self._pool, self._code = reward, pool, code
        self._ledger = Ledger(pool.max_pending)
        workers = WorkerConfig(reward, code, choose_mechanism(sandbox.mechanism), pool.memory_mib)
        self._dispatcher = Dispatcher(workers, pool, self._ledger)
        self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
        self._thread.start()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, item: VerifyItem) -> None:
        """Queue an item; its reward goes to `on_result`. Waits while `max_pending` items are under way.

        Raises:
          MagistralError: The tests of a code problem are malformed, or the pool has failed or is closed.
        """
        if self._on_result is None:
            raise MagistralError("VerifierPool.submit needs on_result; use grade_all to wait for rewards")
        self._enqueue(Task(item), functools.partial(self._on_result, item.request_id), owner=self)

    def grade_all(self, items: Sequence[VerifyItem]) -> list[Reward]:
        """Grade the items and wait for all of them. Rewards come in the order of the items; request ids are not used.

        Raises:
          MagistralError: As `submit`.
        """
        return [reward for _, reward in self.grade_stream(items, ordered=True)]

    def grade_stream(
        self, items: Iterable[VerifyItem], *, ordered: bool = False
    ) -> Generator[tuple[int, Reward], None, None]:
        """Grade items as they are pulled, a bounded number ahead of what has been yielded.

        Closing the generator, or an exception in it, cancels those of its items that are under way.

        Args:
          items: May be endless.
          ordered: Yield in the order of the items; otherwise as they are done.

        Yields:
          The place of an item, from 0, and its reward.

        Raises:
          MagistralError: As `submit`.
        """
        done: queue.SimpleQueue[tuple[int, Reward]] = queue.SimpleQueue()
        finished: dict[int, Reward] = {}
        source, owner = iter(enumerate(items)), object()
        num_pulled = num_yielded = 0
        window = min(self._pool.max_pending, _STREAM_WINDOW * self._pool.num_workers)
        try:
            while True:
                for index, item in itertools.islice(source, window - (num_pulled - num_yielded)):
                    deliver = lambda reward, index=index: done.put((index, reward))
                    self._enqueue(Task(item), deliver, owner)
                    num_pulled += 1
                    if not done.empty():  # a slow source must not hold back what is done
                        break
                if num_pulled == num_yielded:
                    return
                index, reward = done.get()
                self._ledger.check_open()
                finished[index] = reward
                while finished and (not ordered or num_yielded in finished):
                    index = num_yielded if ordered else next(iter(finished))
                    num_yielded += 1
                    yield index, finished.pop(index)
        finally:
            self._cancel(owner)

    def explain(self, item: VerifyItem) -> tuple[Reward, dict[str, Any]]:
        """Grade one item and wait; beside its reward comes what was extracted, parsed and decided.

        Raises:
          MagistralError: As `submit`.
        """
        done: queue.SimpleQueue[Reward] = queue.SimpleQueue()
        job = self._enqueue(Task(item, is_explained=True), done.put, owner=object())
        reward = done.get()
        self._ledger.check_open()
        return reward, job.explanation

    def cancel_all(self) -> int:
        """Drop every submitted item without a reward and return their number.

        Afterwards no callback starts for them; one that runs at this moment may still end. `grade_all` and streams are
        not affected.
        """
        return self._cancel(self)

    def metrics(self) -> PoolMetrics:
        """Counts and times since the pool was made."""
        return self._ledger.snapshot(self._dispatcher.worker_pids)

    def close(self) -> None:
        """End all processes. Items that are still pending get `SANDBOX_ERROR`: cancel them first if that matters."""
        self._dispatcher.stop()
        self._thread.join()

    def _enqueue(self, task: Task, deliver: Callable[[Reward], None], owner: object) -> Job:
        kind, tests, deadline = task.item.problem.kind, None, self._pool.deadline
        if self._reward.function:
            kind = "function"
        elif kind == "code":
            tests = select_tests(task.item.problem, self._code, task.item.test_seed)
            deadline += tests.longest_run(self._code)  # beyond it no limit holds any more: a box is broken
        if kind != "function":  # nothing else reads the other columns, and they may be large
            problem = dataclasses.replace(task.item.problem, extra={})
            task = dataclasses.replace(task, item=dataclasses.replace(task.item, problem=problem), tests=tests)
        job = Job(task, kind, deadline, deliver, owner)
        # A callback that submits must not wait for itself.
        self._ledger.open(job, may_wait=threading.current_thread() is not self._thread)
        self._dispatcher.inbox.append(job)
        self._dispatcher.wake()
        return job

    def _cancel(self, owner: object) -> int:
        num_cancelled = self._ledger.cancel(owner)
        self._dispatcher.wake()
        return num_cancelled

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
