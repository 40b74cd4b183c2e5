"""One simulated generator: all its running sequences move one token in a decode step, whose length depends on how many.

Instead of moving every sequence, the generator counts decode steps. A sequence that starts at step k and has n tokens
ends at step k + n, so the next to end is the top of a heap, and any change costs O(log n). No clock and no random
number is in here: time comes as an argument and only grows.
"""

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

OnPublish = Literal["in_place", "recompute", "drain"]


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A completion to be sampled."""

    id: int
    length: int
    prompt_tokens: float
    reads_prompt: bool = True  # members of a group after the first find it in the cache


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A completion that ended."""

    request_id: int
    length: int
    first_version: int
    mean_version: float  # over its tokens
    tokens_after_swap: float  # sampled under other weights than its first token
    started: float  # seconds
    slot: int


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """Weights that came."""

    time: float
    version: int


@dataclasses.dataclass(slots=True)
class _Running:
    request: Request
    steps: float  # decode steps at the start
    version_steps: float  # integral of the version over the steps at the start
    version: int
    num_swaps: int  # before the start
    started: float
    slot: int


class Generator:
    """The state of one generator between two moments.

    Args:
      step_seconds: Of a decode step, by the number of running sequences.
      num_slots: Sequences that run at a time.
      prefill_seconds: For a token of a prompt.
      swap_seconds: Pause when weights arrive.
      on_publish: What happens to running sequences when weights arrive.
      arrivals: Grows while the simulation runs; what has come by a moment takes effect when that moment is reached.
    """

    def __init__(
        self,
        step_seconds: Sequence[float],
        num_slots: int,
        *,
        prefill_seconds: float,
        swap_seconds: float,
        on_publish: OnPublish,
        arrivals: Sequence[Arrival],
    ) -> None:
        self._step_seconds, self._num_slots = step_seconds, num_slots
        self._prefill_seconds, self._swap_seconds, self._on_publish = prefill_seconds, swap_seconds, on_publish
        self._arrivals, self._num_seen = arrivals, 0
        self.slowdown = 1.0
        self.busy_seconds = self.pause_seconds = self.slot_seconds = 0.0
        self.num_tokens = 0  # of completions that ended
        self._time = self._paused_until = 0.0
        self._steps = self._version_steps = 0.0
        self._version = self._wanted = 0
        self._swaps: list[float] = []  # decode steps at each swap
        self._running: list[tuple[float, int, _Running]] = []
        self._start_steps = self._prompt_tokens = 0.0  # sums over the running, for `recompute`
        self._waiting: deque[Request] = deque()
        self._free_slots = list(range(num_slots))

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._running) + len(self._waiting)

    @property
    def is_busy(self) -> bool:
        """Whether anything runs."""
        return bool(self._running)

    def next_end(self) -> float:
        """When the next sequence ends if nothing changes; infinity where none runs."""
        if not self._running:
            return math.inf
        left = max(self._running[0][0] - self._steps, 0.0)
        return max(self._time, self._paused_until) + left * self._seconds_of_a_step()

    def submit(self, now: float, requests: Iterable[Request]) -> None:
        """Queue requests, and start those for which there is room."""
        self.advance(now)
        self._waiting.extend(requests)
        self._admit()

    def finish(self, now: float) -> list[Sample]:
        """What has ended by now; others take the free places. Empty where a pause has put the end off."""
        self.advance(now)
        samples = []
        while self._running and (self._running[0][0] <= self._steps + 1e-6 or self.next_end() <= now):
            _, _, sequence = heapq.heappop(self._running)
            samples.append(self._end(sequence))
        if samples:
            self._admit()
        return samples

    def fail(self, now: float) -> list[Request]:
        """Die: what was unfinished, to be sampled anew, its prompts read again."""
        self.advance(now)
        lost = [sequence.request for _, _, sequence in sorted(self._running, key=lambda entry: entry[1])]
        lost += self._waiting
        self._running.clear()
        self._waiting.clear()
        self._start_steps = self._prompt_tokens = 0.0
        self._free_slots = list(range(self._num_slots))
        return lost

    def advance(self, now: float) -> None:
        """Let time pass, through every arrival of weights until now."""
        while self._num_seen < len(self._arrivals) and self._arrivals[self._num_seen].time <= now:
            arrival = self._arrivals[self._num_seen]
            self._num_seen += 1
            self._move(arrival.time)
            self._wanted = arrival.version
            if self._on_publish != "drain" or not self._running:
                self._swap()
        self._move(now)

    def _move(self, now: float) -> None:
        if now <= self._time:
            return
        if self._running:
            begin = min(max(self._time, self._paused_until), now)
            steps = (now - begin) / self._seconds_of_a_step()
            self._steps += steps
            self._version_steps += steps * self._version
            self.busy_seconds += now - self._time
            self.slot_seconds += (now - self._time) * len(self._running)
            self.pause_seconds += begin - self._time
        self._time = now

    def _swap(self) -> None:
        self._version = self._wanted
        self._swaps.append(self._steps)
        pause = self._swap_seconds
        if self._on_publish == "recompute":
            context = len(self._running) * self._steps - self._start_steps + self._prompt_tokens
            pause += context * self._prefill_seconds
        self._pause(pause)

    def _pause(self, seconds: float) -> None:
        self._paused_until = max(self._paused_until, self._time) + seconds

    def _admit(self) -> None:
        if self._version != self._wanted:  # draining
            if self._running:
                return
            self._swap()
        while self._waiting and len(self._running) < self._num_slots:
            request = self._waiting.popleft()
            if request.reads_prompt:
                self._pause(request.prompt_tokens * self._prefill_seconds)
            slot = heapq.heappop(self._free_slots)
            sequence = _Running(
                request, self._steps, self._version_steps, self._version, len(self._swaps), self._time, slot
            )
            self._start_steps += self._steps
            self._prompt_tokens += request.prompt_tokens
            heapq.heappush(self._running, (self._steps + request.length, request.id, sequence))

    def _end(self, sequence: _Running) -> Sample:
        request = sequence.request
        heapq.heappush(self._free_slots, sequence.slot)
        self._start_steps -= sequence.steps
        self._prompt_tokens -= request.prompt_tokens
        self.num_tokens += request.length
        has_swapped = sequence.num_swaps < len(self._swaps)
        return Sample(
            request.id,
            request.length,
            first_version=sequence.version,
            mean_version=(self._version_steps - sequence.version_steps) / max(self._steps - sequence.steps, 1e-9),
            tokens_after_swap=self._steps - self._swaps[sequence.num_swaps] if has_swapped else 0.0,
            started=sequence.started,
            slot=sequence.slot,
        )

    def _seconds_of_a_step(self) -> float:
        return self._step_seconds[len(self._running)] * self.slowdown
