"""Sequences of an engine and the pages that they hold. Host bookkeeping: no arrays on devices, no policy.

Sequences with equal prompts share a `Prefix`: its tokens are read once; its full pages are shared by reference, and of
a last page that is only partly filled each sequence gets a copy of its own. Pages for what is sampled are taken as the
sequence grows, so the pool may run out, and somebody has to make room.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32

from magistral_jax.generate.kv_pages import PageAllocator
from magistral_jax.records import Rollout, SamplingParams


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One completion to make. Requests with equal prompts share its pages."""

    request_id: int
    prompt_ids: Int32[np.ndarray, " T"]
    sampling: SamplingParams
    random_id: int | None = None
    """Names the random numbers that it is sampled with, in 32 bits; None takes `request_id`."""


@dataclasses.dataclass(eq=False)
class Prefix:
    """What one or more sequences have to read before they can sample: all their tokens but the last."""

    tokens: Int32[np.ndarray, " T"]
    pages: list[int]
    num_full: int
    num_written: int = 0
    num_waiting: int = 0  # sequences in slots that cannot start before it is complete

    @property
    def is_complete(self) -> bool:
        """Whether keys and values of all tokens are in the pages."""
        return self.num_written == len(self.tokens)


Alternatives = list[tuple[int, float]]
"""The most probable tokens in one place and their log-probs, the likeliest first."""


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request on its way: what was sampled, and while it is in a slot, its pages."""

    request: GenerationRequest
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    alternatives: list[Alternatives] = dataclasses.field(default_factory=list)  # where the engine looks for them
    pages: list[int] = dataclasses.field(default_factory=list)
    prefix: Prefix | None = None  # until it starts

    @property
    def is_started(self) -> bool:
        """Whether it samples; only meaningful for a sequence in a slot."""
        return self.prefix is None

    def all_tokens(self) -> Int32[np.ndarray, " T"]:
        """Prompt and what was sampled so far."""
        return np.concatenate([self.request.prompt_ids, np.asarray(self.tokens, np.int32)])

    def num_cached_after(self, num_steps: int) -> int:
        """Positions in the cache after so many decode steps; the last token of a completion is never fed."""
        prompt = len(self.request.prompt_ids)
        return min(prompt + len(self.tokens) - 1 + num_steps, prompt + self.request.sampling.max_new_tokens - 1)

    def rollout(self, *, truncated: bool) -> Rollout:
        """The finished completion."""
        return Rollout(
            request_id=self.request.request_id,
            prompt_ids=self.request.prompt_ids,
            completion_ids=np.asarray(self.tokens, np.int32),
            behavior_logprob=np.asarray(self.logprobs, np.float32),
            weight_version=np.asarray(self.versions, np.int32),
            truncated=truncated,
        )


class SequencePages:
    """The page pool as sequences use it.

    Args:
      num_pages: Pages of the pool.
      page_size: Tokens of a page.
      num_steps: Decode steps for which a sequence is given pages at a time.
    """

    def __init__(self, num_pages: int, page_size: int, num_steps: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self._size, self._num_steps = page_size, num_steps
        self._prefixes: dict[bytes, Prefix] = {}

    def open(self, sequence: Sequence, num_reserved: int) -> bool:
        """Give a sequence its prefix and pages for its first steps, if as many as `num_reserved` remain free."""
        cached = sequence.all_tokens()[:-1]  # the last token is fed by the first decode step
        prefix = self._prefixes.get(cached.tobytes())
        num_full, has_partial = len(cached) // self._size, len(cached) % self._size > 0
        num_own = self._num_pages(sequence) - num_full
        num_new = num_own + (0 if prefix else num_full + has_partial)
        if num_new + num_reserved > self.allocator.num_free:
            return False
        if prefix is None:
            prefix = Prefix(cached, self.allocator.allocate(num_full + has_partial), num_full)
            self._prefixes[cached.tobytes()] = prefix
        prefix.num_waiting += 1
        shared = prefix.pages[:num_full]
        self.allocator.share(shared)
        sequence.pages = [*shared, *self.allocator.allocate(num_own)]
        sequence.prefix = prefix
        return True

    def start(self, sequence: Sequence) -> tuple[int, int] | None:
        """Let a sequence go from its complete prefix; returns (page to copy, page of its own) where one is begun."""
        prefix = sequence.prefix
        assert prefix is not None
        assert prefix.is_complete
        sequence.prefix = None
        prefix.num_waiting -= 1
        has_partial = len(prefix.pages) > prefix.num_full
        return (prefix.pages[-1], sequence.pages[prefix.num_full]) if has_partial else None

    def extend(self, sequence: Sequence) -> bool:
        """Take the pages that a started sequence needs for its next steps; False, and nothing taken, without room."""
        missing = self._num_pages(sequence) - len(sequence.pages)
        if missing > self.allocator.num_free:
            return False
        sequence.pages += self.allocator.allocate(max(missing, 0))
        return True

    def close(self, sequence: Sequence) -> None:
        """Give back what a sequence holds."""
        self.allocator.release(sequence.pages)
        sequence.pages = []
        if sequence.prefix is not None:
            sequence.prefix.num_waiting -= 1
            sequence.prefix = None

    def unread_prefixes(self) -> list[Prefix]:
        """Those that somebody waits for, oldest first."""
        return [p for p in self._prefixes.values() if p.num_waiting and not p.is_complete]

    def drop_prefixes(self, keep_for: Sequence | None = None) -> None:
        """Forget the prefixes that nobody waits for, but for that of one sequence, the next to come.

        Keeping those of everybody in the queue could fill the pool with prompts, and then nobody could ever start.
        """
        wanted = keep_for.all_tokens()[:-1].tobytes() if keep_for else None
        for key, prefix in list(self._prefixes.items()):
            if not prefix.num_waiting and key != wanted:
                self.allocator.release(self._prefixes.pop(key).pages)

    def _num_pages(self, sequence: Sequence) -> int:
        return -(-sequence.num_cached_after(self._num_steps) // self._size)
