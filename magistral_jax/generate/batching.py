"""Continuous batching: which request sits in which slot, on which pages. Host bookkeeping of one engine.

    submit → (slot and pages free) → prefill the prompt once for its group → decode blocks → finished rollout

Pages for a whole completion are reserved at admission, so a running sequence can always go on.
"""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from magistral_jax.generate import engine
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.kv_pages import PageAllocator
from magistral_jax.policy.config import ModelConfig
from magistral_jax.records import MagistralError, Rollout, SamplingParams

_SMALLEST_PREFILL = 16  # tokens of the smallest prefill shape; larger ones double
_SMALLEST_ROWS = 8  # slots of the smallest decode shape


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One completion to make. Requests with equal prompts share its pages."""

    request_id: int
    prompt_ids: Int32[np.ndarray, " T"]
    sampling: SamplingParams


@dataclasses.dataclass
class _Sequence:
    request: GenerationRequest
    pages: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)

    def prefix(self) -> Int32[np.ndarray, " T"]:
        return np.concatenate([self.request.prompt_ids, np.asarray(self.tokens, np.int32)])


@dataclasses.dataclass
class _SharedPrefix:
    pages: list[int]  # the full pages, and last the partly filled one where there is one
    num_full: int


class ContinuousBatcher:
    """One engine with its queue. Not thread-safe: `service` owns it from one thread."""

    def __init__(self, model: ModelConfig, config: GenerationConfig, stop_ids: tuple[int, ...], seed: int) -> None:
        self._model, self._config = model, config
        self._stops = frozenset(stop_ids)
        self._stop_ids = jnp.asarray(sorted(stop_ids), jnp.int32)
        self._key = jax.random.key(seed)
        longest = config.max_prompt_tokens + config.max_new_tokens
        self._table_width = -(-longest // config.page_size)
        spare = config.prefill_rows * self._table_width
        num_pages = config.num_pages or config.num_slots * self._table_width + spare
        if num_pages < self._table_width + 1:  # the prompt's last, partly filled page exists twice
            raise MagistralError(
                f"`generation.num_pages` is {num_pages}, but one sequence of {longest} tokens may need "
                f"{self._table_width + 1} pages of {config.page_size} tokens."
            )
        self._row_counts = _halvings(config.num_slots, smallest=_SMALLEST_ROWS)
        self._allocator = PageAllocator(num_pages)
        self._state = engine.init_state(
            model,
            num_slots=config.num_slots,
            num_pages=num_pages,
            page_size=config.page_size,
            table_width=self._table_width,
            dtype=jnp.dtype(config.kv_dtype),
        )
        self._waiting: collections.deque[_Sequence] = collections.deque()
        self._slots: list[_Sequence | None] = [None] * config.num_slots
        self._prefixes: dict[bytes, _SharedPrefix] = {}
        self._params: dict[str, Any] | None = None
        self._incoming: tuple[dict[str, Any], int] | None = None
        self.version = -1
        self.num_swaps = 0
        self.num_prefilled = 0
        self.num_sampled = 0

    @property
    def num_running(self) -> int:
        """Sequences that sit in a slot."""
        return sum(sequence is not None for sequence in self._slots)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def has_new_weights(self) -> bool:
        """Whether weights wait to be swapped in."""
        return self._incoming is not None

    @property
    def params(self) -> dict[str, Any]:
        """The weights that the next block will use."""
        if self._params is None:
            raise ValueError("no weights yet: the first publish comes before the first rollout")
        return self._params

    @property
    def allocator(self) -> PageAllocator:
        """The page accounts."""
        return self._allocator

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
          MagistralError: The prompt is empty or too long, or asks for more new tokens than the engine was made for.
        """
        length, new = len(request.prompt_ids), request.sampling.max_new_tokens
        if not 1 <= length <= self._config.max_prompt_tokens:
            raise MagistralError(
                f"Prompt of request {request.request_id} has {length} tokens; expected 1 to "
                f"{self._config.max_prompt_tokens} (generation.max_prompt_tokens)."
            )
        if not 1 <= new <= self._config.max_new_tokens:
            raise MagistralError(
                f"Request {request.request_id} asks for {new} new tokens; expected 1 to "
                f"{self._config.max_new_tokens} (generation.max_new_tokens)."
            )
        self._waiting.append(_Sequence(request))

    def set_weights(self, params: dict[str, Any], version: int) -> None:
        """Hand over new weights; they take effect before the next block, or once drained (`on_publish`)."""
        newest = self.version if self._incoming is None else self._incoming[1]
        if version < newest:
            raise ValueError(f"weight version {version} after {newest}: versions never go back")
        self._incoming = (params, version)

    def cancel_all(self) -> list[int]:
        """Give up everything queued and running; returns the request ids."""
        running = [s for s in self._slots if s is not None]
        cancelled = [s.request.request_id for s in (*running, *self._waiting)]
        self._vacate(running)
        self._waiting.clear()
        self._drop_idle_prefixes()
        return cancelled

    def step(self) -> list[Rollout]:
        """Swap weights if some arrived, admit what fits, decode one block; returns what ended in it."""
        self._swap_weights()
        params = self.params
        if self._incoming is None:  # draining engines admit nothing
            self._admit()
        if self.num_running == 0:
            return []
        rows = self._choose_rows()
        self._state, block = engine.decode_block(
            params,
            self._model,
            self._state,
            rows,
            self._stop_ids,
            self._key,
            num_steps=self._config.decode_block,
        )
        return self._collect(rows, np.asarray(block.tokens), np.asarray(block.logprob), np.asarray(block.is_sampled))

    def _choose_rows(self) -> Int32[np.ndarray, " R"]:
        """Slots of the next block, the busy ones first; of few different numbers, since each is compiled."""
        num_rows = next(count for count in self._row_counts if count >= self.num_running)
        is_idle = np.array([sequence is None for sequence in self._slots])
        return np.argsort(is_idle, kind="stable")[:num_rows].astype(np.int32)

    def _swap_weights(self) -> None:
        if self._incoming is None:
            return
        running = [s for s in self._slots if s is not None]
        if self._config.on_publish == "drain" and running:
            return
        self._params, self.version = self._incoming
        self.num_swaps += 1
        self._incoming = None
        if self._config.on_publish == "recompute":
            self._vacate(running)
            self._waiting.extendleft(reversed(running))
        # New arrivals read a prompt that the new weights have seen; running ones keep their pages.
        for prefix in self._prefixes.values():
            self._allocator.release(prefix.pages)
        self._prefixes.clear()

    def _vacate(self, sequences: list[_Sequence]) -> None:
        gone = {id(s) for s in sequences}
        is_stopped = np.array([s is not None and id(s) in gone for s in self._slots])
        self._slots = [None if stopped else s for s, stopped in zip(self._slots, is_stopped, strict=True)]
        slots = engine.deactivate(self._state.slots, jnp.asarray(is_stopped))
        self._state = engine.EngineState(self._state.layers, slots)
        for sequence in sequences:
            self._allocator.release(sequence.pages)
            sequence.pages = []

    def _admit(self) -> None:
        placed: list[tuple[int, _Sequence, _SharedPrefix]] = []
        fresh: list[tuple[Int32[np.ndarray, " _"], _SharedPrefix]] = []
        for slot in [i for i, s in enumerate(self._slots) if s is None]:
            if not self._waiting or len(fresh) == self._config.prefill_rows:
                break
            sequence = self._waiting[0]
            prefix = self._reserve(sequence, fresh)
            if prefix is None:
                break
            self._waiting.popleft()
            self._slots[slot] = sequence
            placed.append((slot, sequence, prefix))
        if fresh:
            self._prefill(fresh)
        if placed:
            self._start(placed)
            self._drop_idle_prefixes()

    def _reserve(
        self, sequence: _Sequence, fresh: list[tuple[Int32[np.ndarray, " _"], _SharedPrefix]]
    ) -> _SharedPrefix | None:
        tokens = sequence.prefix()
        size = self._config.page_size
        cached = len(tokens) - 1  # the last token is fed by the first decode step
        num_full, has_partial = cached // size, cached % size > 0
        last = len(sequence.request.prompt_ids) + sequence.request.sampling.max_new_tokens
        own = -(-last // size) - num_full
        key = tokens.tobytes()
        prefix = self._prefixes.get(key)
        needed = own if prefix else own + num_full + has_partial
        if needed > self._allocator.num_free:
            return None
        if prefix is None:
            prefix = _SharedPrefix(self._allocator.allocate(num_full + has_partial), num_full)
            self._prefixes[key] = prefix
            if cached:
                fresh.append((tokens[:-1], prefix))
        shared = prefix.pages[:num_full]
        self._allocator.share(shared)
        sequence.pages = [*shared, *self._allocator.allocate(own)]
        return prefix

    def _prefill(self, fresh: list[tuple[Int32[np.ndarray, " _"], _SharedPrefix]]) -> None:
        # Rows and width are rounded up to powers of two: few shapes to compile, and a lone prompt costs a lone row.
        width = max(_SMALLEST_PREFILL, _next_power_of_two(max(len(tokens) for tokens, _ in fresh)))
        rows = min(_next_power_of_two(len(fresh)), self._config.prefill_rows)
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        table = np.zeros((rows, self._table_width), np.int32)
        for row, (prompt, prefix) in enumerate(fresh):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
            table[row, : len(prefix.pages)] = prefix.pages
        self.num_prefilled += int(lengths.sum())
        self._state = engine.prefill(self.params, self._model, self._state, tokens, lengths, table)

    def _start(self, placed: list[tuple[int, _Sequence, _SharedPrefix]]) -> None:
        count, nowhere = self._config.num_slots, self._allocator.num_pages
        table = np.zeros((count, self._table_width), np.int32)
        integers = {n: np.zeros(count, np.int32) for n in ("token", "position", "last_position", "top_k")}
        request_id = np.zeros(count, np.uint32)
        temperature, top_p = np.ones(count, np.float32), np.ones(count, np.float32)
        is_new = np.zeros(count, bool)
        source, target = np.zeros(count, np.int32), np.full(count, nowhere, np.int32)
        for slot, sequence, prefix in placed:
            request, tokens = sequence.request, sequence.prefix()
            is_new[slot] = True
            table[slot, : len(sequence.pages)] = sequence.pages
            integers["token"][slot] = tokens[-1]
            integers["position"][slot] = len(tokens) - 1
            integers["last_position"][slot] = len(request.prompt_ids) + request.sampling.max_new_tokens - 1
            integers["top_k"][slot] = request.sampling.top_k
            request_id[slot] = request.request_id
            temperature[slot], top_p[slot] = request.sampling.temperature, request.sampling.top_p
            if len(prefix.pages) > prefix.num_full:
                source[slot], target[slot] = prefix.pages[-1], sequence.pages[prefix.num_full]
        arrivals = engine.Slots(
            page_table=jnp.asarray(table),
            is_active=jnp.asarray(is_new),
            request_id=jnp.asarray(request_id),
            temperature=jnp.asarray(temperature),
            top_p=jnp.asarray(top_p),
            **{name: jnp.asarray(values) for name, values in integers.items()},
        )
        self._state = engine.admit(self._state, arrivals, is_new, source, target)

    def _drop_idle_prefixes(self) -> None:
        # Only the next in line keeps its prompt's pages. Keeping those of everybody who waits could fill the pool
        # with prompts, and then nobody could ever start.
        wanted = self._waiting[0].prefix().tobytes() if self._waiting else None
        for key in [key for key in self._prefixes if key != wanted]:
            self._allocator.release(self._prefixes.pop(key).pages)

    def _collect(
        self, rows: np.ndarray, tokens: np.ndarray, logprob: np.ndarray, is_sampled: np.ndarray
    ) -> list[Rollout]:
        finished = []
        for column, slot in enumerate(rows.tolist()):
            sequence = self._slots[slot]
            if sequence is None:
                continue
            count = int(is_sampled[:, column].sum())
            sequence.tokens += tokens[:count, column].tolist()
            sequence.logprobs += logprob[:count, column].tolist()
            sequence.versions += [self.version] * count
            self.num_sampled += count
            has_stopped = sequence.tokens[-1] in self._stops
            if has_stopped or len(sequence.tokens) == sequence.request.sampling.max_new_tokens:
                finished.append(_rollout(sequence, truncated=not has_stopped))
                self._slots[slot] = None
                self._allocator.release(sequence.pages)
        return finished


def _halvings(largest: int, *, smallest: int) -> tuple[int, ...]:
    """`largest`, its half, quarter, …, rounded up and not below `smallest`, in rising order."""
    sizes = [largest]
    while (half := -(-sizes[-1] // 2)) >= smallest and half < sizes[-1]:
        sizes.append(half)
    return tuple(reversed(sizes))


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _rollout(sequence: _Sequence, *, truncated: bool) -> Rollout:
    return Rollout(
        request_id=sequence.request.request_id,
        prompt_ids=sequence.request.prompt_ids,
        completion_ids=np.asarray(sequence.tokens, np.int32),
        behavior_logprob=np.asarray(sequence.logprobs, np.float32),
        weight_version=np.asarray(sequence.versions, np.int32),
        truncated=truncated,
    )
