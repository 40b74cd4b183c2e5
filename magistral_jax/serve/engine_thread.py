"""The one thread that owns the engine of a service; out: what was sampled, step by step.

Commands come in through a queue and are carried out between two steps; nothing here waits for a client.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.generate.sequences import Alternatives, Sequence
from magistral_jax.records import Rollout
from magistral_jax.serve.scoring import PromptScore, PromptScorer


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one step added to a completion; `finish` says why it was the last: a stop token, or the limit."""

    request_id: int
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: Literal["stop", "length"] | None = None
    alternatives: list[Alternatives] = dataclasses.field(default_factory=list)
    """One for each token, or none at all where the engine does not look for them."""


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts of an engine between two steps."""

    version: int
    is_paused: bool
    num_running: int
    num_waiting: int
    num_scoring: int  # prompts whose log-probs are wanted
    num_slots: int
    free_pages: int
    num_pages: int
    num_steps: int
    prompt_tokens: int  # read; a shared prompt counts once
    sampled_tokens: int
    scored_tokens: int
    num_preempted: int
    num_swaps: int


class EngineThread:
    """Runs an engine until stopped.

    Args:
      batcher: The engine, with weights; this thread alone touches it from `start` to `stop`.
      scorer: For log-probs of prompts.
      num_slots: Sequences that the engine decodes at one time.
      emit: Called with what each step made.
      on_failure: Called once with the exception that ended the thread.
    """

    def __init__(
        self,
        batcher: ContinuousBatcher,
        scorer: PromptScorer,
        *,
        num_slots: int,
        emit: Callable[[list[Delta | PromptScore]], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._batcher, self._scorer, self._num_slots = batcher, scorer, num_slots
        self._emit, self._on_failure = emit, on_failure
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._num_sent: dict[int, int] = {}  # tokens of each running completion that were emitted
        self._is_paused = False
        self._num_steps = 0
        self._newest_version = batcher.version
        self.stats = self._read_stats()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, requests: Iterable[GenerationRequest], scored: dict[int, Int32[np.ndarray, " _"]]) -> None:
        """Queue completions to make, and by their ids prompts to score."""

        def command() -> None:
            for request in requests:
                self._batcher.submit(request)
            for request_id, token_ids in scored.items():
                self._scorer.submit(request_id, token_ids)

        self._commands.put(command)

    def cancel(self, request_ids: list[int]) -> None:
        """Give up what of these is not done; their slots and pages are free before the next step."""

        def command() -> None:
            self._scorer.cancel(request_ids)
            for request_id in self._batcher.cancel(request_ids):
                self._num_sent.pop(request_id, None)

        self._commands.put(command)

    def pause(self, is_paused: bool, done: Callable[[], None]) -> None:
        """Stop stepping, or go on; `done` is called between two steps, when it is so."""

        def command() -> None:
            self._is_paused = is_paused
            self.stats = self._read_stats()
            done()

        self._commands.put(command)

    def set_weights(self, params: Any, done: Callable[[int, bool], None]) -> None:
        """Hand over weights; `done(version, is_active)`: not active yet where running completions have to end first."""

        def command() -> None:
            self._newest_version += 1
            self._batcher.set_weights(params, self._newest_version)
            self._batcher.swap_weights()
            self.stats = self._read_stats()
            done(self._newest_version, not self._batcher.has_new_weights)

        self._commands.put(command)

    def stop(self, deadline: float) -> None:
        """End after the running step; what is unfinished is given up.

        Raises:
          TimeoutError: The thread is still busy after `deadline` seconds.
        """
        self._commands.put(None)
        self._thread.join(deadline)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine did not stop within {deadline} s")

    def _run(self) -> None:
        try:
            while self._obey():
                self._advance()
            self._batcher.cancel_all()
        except Exception as error:
            self._on_failure(error)

    def _obey(self) -> bool:
        """Carry out what is queued, and wait for more while there is nothing else to do; False when told to stop."""
        while True:
            self.stats = stats = self._read_stats()
            is_busy = stats.num_running or stats.num_waiting or stats.num_scoring or self._batcher.has_new_weights
            try:
                command = self._commands.get(block=stats.is_paused or not is_busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _advance(self) -> None:
        rollouts = self._batcher.step()
        scores = self._scorer.advance(self._batcher.params)
        self._num_steps += 1
        deltas = [
            self._finish(sequence, rollout) for sequence, rollout in zip(self._batcher.ended, rollouts, strict=True)
        ]
        for sequence in self._batcher.running():
            if delta := self._continue(sequence):
                deltas.append(delta)
        if deltas or scores:
            self._emit([*deltas, *scores])

    def _continue(self, sequence: Sequence) -> Delta | None:
        request_id, count = sequence.request.request_id, len(sequence.tokens)
        start = self._num_sent.get(request_id, 0)
        if count == start:
            return None
        self._num_sent[request_id] = count
        return _delta(sequence, start)

    def _finish(self, sequence: Sequence, rollout: Rollout) -> Delta:
        start = self._num_sent.pop(rollout.request_id, 0)
        return dataclasses.replace(_delta(sequence, start), finish="length" if rollout.truncated else "stop")

    def _read_stats(self) -> EngineStats:
        batcher = self._batcher
        return EngineStats(
            version=batcher.version,
            is_paused=self._is_paused,
            num_running=batcher.num_running,
            num_waiting=batcher.num_waiting,
            num_scoring=self._scorer.num_waiting,
            num_slots=self._num_slots,
            free_pages=batcher.allocator.num_free,
            num_pages=batcher.allocator.num_pages,
            num_steps=self._num_steps,
            prompt_tokens=batcher.num_prefilled,
            sampled_tokens=batcher.num_sampled,
            scored_tokens=self._scorer.num_scored,
            num_preempted=batcher.num_preempted,
            num_swaps=batcher.num_swaps,
        )


def _delta(sequence: Sequence, start: int) -> Delta:
    tokens, logprobs, versions = sequence.tokens[start:], sequence.logprobs[start:], sequence.versions[start:]
    alternatives = sequence.alternatives[start:]
    return Delta(sequence.request.request_id, tokens, logprobs, versions, alternatives=alternatives)
