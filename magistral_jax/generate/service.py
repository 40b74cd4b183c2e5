"""The generator role: one thread that owns one engine and never waits for anybody.

Commands come in through a queue and take effect between decode blocks; finished rollouts and receipts for weights go
out through callbacks.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.records import Rollout, WeightVersion

_IDLE_POLL = 0.05  # seconds that an idle engine waits for a command before it looks again


@dataclasses.dataclass(frozen=True)
class GeneratorUsage:
    """Seconds since the first weights, by what the engine was doing, and tokens sampled."""

    busy: float = 0.0
    idle: float = 0.0
    idle_at_bound: float = 0.0  # the part of `idle` in which admission allowed no more work
    num_tokens: int = 0

    def __sub__(self, earlier: "GeneratorUsage") -> "GeneratorUsage":
        """What happened between two readings."""
        names = [f.name for f in dataclasses.fields(self)]
        return GeneratorUsage(**{n: getattr(self, n) - getattr(earlier, n) for n in names})


class GeneratorThread:
    """Runs an engine until stopped.

    Args:
      batcher: The engine; this thread alone touches it from `start` to `stop`.
      on_rollout: Called with each finished completion.
      on_weights: Called with the receipt of each weight swap, computed from what the engine holds.
      on_failure: Called once with the exception that ended the thread.
    """

    def __init__(
        self,
        batcher: ContinuousBatcher,
        *,
        on_rollout: Callable[[Rollout], None],
        on_weights: Callable[[WeightVersion], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._batcher = batcher
        self._on_rollout, self._on_weights, self._on_failure = on_rollout, on_weights, on_failure
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._usage = GeneratorUsage()
        self._num_acknowledged = batcher.num_swaps
        self.is_at_bound = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests; those of one prompt belong together."""

        def command() -> None:
            for request in requests:
                self._batcher.submit(request)

        self._commands.put(command)

    def set_weights(self, params: Any, version: int) -> None:
        """Hand over weights, to be swapped in between two decode blocks."""
        self._commands.put(lambda: self._batcher.set_weights(params, version))

    def usage(self) -> GeneratorUsage:
        """Reading of the meter."""
        return self._usage

    def stop(self, deadline: float) -> None:
        """End after the running block; what is unfinished is given up.

        Raises:
          TimeoutError: The thread is still busy after `deadline` seconds.
        """
        self._commands.put(None)
        self._thread.join(deadline)
        if self._thread.is_alive():
            raise TimeoutError(f"the generator did not stop within {deadline} s")

    def _run(self) -> None:
        try:
            while self._obey():
                self._advance()
            self._batcher.cancel_all()
        except Exception as error:
            self._on_failure(error)

    def _obey(self) -> bool:
        """Carry out what is queued; False when told to stop."""
        is_idle = self._batcher.num_running == 0 and self._batcher.num_waiting == 0
        began = time.monotonic()
        try:
            command = self._commands.get(timeout=_IDLE_POLL) if is_idle else self._commands.get_nowait()
            while command is not None:
                command()
                command = self._commands.get_nowait()
            return False
        except queue.Empty:
            return True
        finally:
            if is_idle:
                self._count_idle(time.monotonic() - began)

    def _advance(self) -> None:
        began = time.monotonic()
        if self._batcher.num_running == 0 and self._batcher.num_waiting == 0 and not self._batcher.has_new_weights:
            return
        rollouts = self._batcher.step()
        if self._batcher.num_swaps != self._num_acknowledged:
            self._num_acknowledged = self._batcher.num_swaps
            self._on_weights(WeightVersion(self._batcher.version, fingerprint(self._batcher.params)))
        for rollout in rollouts:
            self._on_rollout(rollout)
        elapsed = time.monotonic() - began
        sampled = self._batcher.num_sampled
        self._usage = dataclasses.replace(self._usage, busy=self._usage.busy + elapsed, num_tokens=sampled)

    def _count_idle(self, seconds: float) -> None:
        if self._batcher.version < 0:
            return  # the meter starts with the first weights
        usage = self._usage
        at_bound = seconds if self.is_at_bound else 0.0
        self._usage = dataclasses.replace(
            usage, idle=usage.idle + seconds, idle_at_bound=usage.idle_at_bound + at_bound
        )
