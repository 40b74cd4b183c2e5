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
from magistral_jax.generate.handle import GeneratorUsage, Intake, Reports
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.records import WeightVersion

_IDLE_POLL = 0.05  # seconds that an idle engine waits for a command before it looks again


class GeneratorThread:
    """Runs an engine until stopped: a `Generator` inside this process.

    Args:
      batcher: The engine; this thread alone touches it from `start` to `stop`.
      reports: Where it reports, from this thread.
    """

    def __init__(self, batcher: ContinuousBatcher, reports: Reports) -> None:
        self._batcher, self._reports = batcher, reports
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._usage = GeneratorUsage()
        self._num_steps, self._is_held = 0, False
        self._num_acknowledged = batcher.num_swaps
        self._known: tuple[Any, int | None] = (None, None)  # weights and their fingerprint
        self._last_round = time.monotonic()
        self.is_at_bound = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests; those of one prompt belong together."""

        def command() -> None:
            for request in requests:
                self._batcher.submit(request)
            ids = tuple(request.request_id for request in requests)
            self._reports.on_intake(Intake(self._num_steps, request_ids=ids))

        self._commands.put(command)

    def hold(self) -> None:
        """From here on, and before any work, step only as `advance` says: what was recorded is replayed."""
        self._is_held = True

    def advance(self, step: int) -> None:
        """Queue the order to take as many steps, counted from the first one, before what is queued later."""

        def command() -> None:
            while self._num_steps < step:
                self._step()

        self._commands.put(command)

    def set_weights(self, params: Any, version: int, known_fingerprint: int | None = None) -> None:
        """Hand over weights, to be swapped in between two decode blocks.

        Args:
          params: In the layout of decoding, on the engine's device.
          version: Not below any that came before.
          known_fingerprint: Of `params`, where it was computed on this side already; it need not hold up decoding then.
        """

        def command() -> None:
            self._batcher.set_weights(params, version)
            self._known = (params, known_fingerprint)
            self._reports.on_intake(Intake(self._num_steps, version=version))

        self._commands.put(command)

    def usage(self) -> GeneratorUsage:
        """Reading of the meter."""
        return self._usage

    def seconds_in_round(self) -> float:
        """How long the engine has been at what it does now, be it a step or a wait for work."""
        return time.monotonic() - self._last_round

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
                self._last_round = time.monotonic()
            self._batcher.cancel_all()
        except Exception as error:
            self._reports.on_failure(error)

    def _obey(self) -> bool:
        """Carry out what is queued; False when told to stop."""
        is_idle = self._is_held or (self._batcher.num_running == 0 and self._batcher.num_waiting == 0)
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
        has_work = self._batcher.num_running or self._batcher.num_waiting or self._batcher.has_new_weights
        if has_work and not self._is_held:
            self._step()

    def _step(self) -> None:
        """One step of the engine. All that it depends on was reported as `Intake`, so the same steps can be redone."""
        began = self._last_round = time.monotonic()
        rollouts = self._batcher.step()
        if self._batcher.num_swaps != self._num_acknowledged:
            self._num_acknowledged = self._batcher.num_swaps
            params, known = self._known
            if known is None or params is not self._batcher.params:
                known = fingerprint(self._batcher.params)
            self._reports.on_weights(WeightVersion(self._batcher.version, known))
        for rollout in rollouts:
            self._reports.on_rollout(dataclasses.replace(rollout, engine_step=self._num_steps))
        self._num_steps += 1
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
