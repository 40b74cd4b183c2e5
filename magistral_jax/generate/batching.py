"""Continuous batching: which request sits in which slot. Host side of one engine; decides, and calls `engine`.

    submit → (slot and pages free) → read the prompt, a chunk a step → decode blocks → finished rollout

A step reads at most `prefill_rows` × `prefill_chunk` prompt tokens and then decodes one block, so a long prompt never
holds up those who sample. Pages are taken as sequences grow. When none are free, the youngest sequence goes back to
the head of the queue and reads its own tokens again when it returns; one alone always fits, so there is no deadlock.
"""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from magistral_jax.generate import engine
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.kv_pages import PageAllocator
from magistral_jax.generate.sequences import GenerationRequest, Prefix, Sequence, SequencePages
from magistral_jax.generate.shapes import PrefillShapes, decode_row_counts
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.enqueue import turn
from magistral_jax.policy.paged_attention import choose_reader
from magistral_jax.records import MagistralError, Rollout

__all__ = ["ContinuousBatcher", "GenerationRequest"]

_CPU_DISPATCH_TOKENS = 64  # what a dispatch costs, in tokens of prefill; measured
_DISPATCH_TOKENS = 256  # the same on accelerators; a guess


class ContinuousBatcher:
    """One engine with its queue. Not thread-safe: `service` owns it from one thread."""

    def __init__(
        self,
        model: ModelConfig,
        config: GenerationConfig,
        stop_ids: tuple[int, ...],
        seed: int,
        mesh: Mesh | None = None,
        num_top: int = 0,
    ) -> None:
        self._model, self._config, self._num_top = model, config, num_top
        self.reader = choose_reader(config.attention, model, kv_dtype=config.kv_dtype, mesh=mesh)
        self._stops = frozenset(stop_ids)
        self._stop_ids = jnp.asarray(sorted(stop_ids), jnp.int32)
        self._key = jax.random.key(seed)
        self._turn = turn(mesh)
        longest = config.max_prompt_tokens + config.max_new_tokens
        self._table_width = -(-longest // config.page_size)
        spare = config.prefill_rows * self._table_width
        num_pages = config.num_pages or config.num_slots * self._table_width + spare
        if num_pages < self._table_width + 1:  # the prompt's last, partly filled page exists twice
            raise MagistralError(
                f"`generation.num_pages` is {num_pages}, but one sequence of {longest} tokens may need "
                f"{self._table_width + 1} pages of {config.page_size} tokens."
            )
        self._row_counts = decode_row_counts(config.num_slots)
        self._pages = SequencePages(num_pages, config.page_size, config.decode_block)
        self._state = engine.init_state(
            model,
            num_slots=config.num_slots,
            num_pages=num_pages,
            page_size=config.page_size,
            dtype=jnp.dtype(config.kv_dtype),
            reader=self.reader,
        )
        is_on_cpu = next(iter(self._state.slots.token.devices())).platform == "cpu"
        dispatch_tokens = _CPU_DISPATCH_TOKENS if is_on_cpu else _DISPATCH_TOKENS
        self._prefill_shapes = PrefillShapes(config.prefill_chunk, config.prefill_rows, longest, dispatch_tokens)
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._slots: dict[int, Sequence] = {}  # from the oldest to the youngest
        self.ended: list[Sequence] = []  # in the latest step, in the order of its rollouts
        self._params: dict[str, Any] | None = None
        self._incoming: tuple[dict[str, Any], int] | None = None
        self.version = -1
        self.num_swaps = 0
        self.num_prefilled = 0
        self.num_sampled = 0
        self.num_preempted = 0

    @property
    def num_running(self) -> int:
        """Sequences that sit in a slot."""
        return len(self._slots)

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
        return self._pages.allocator

    def running(self) -> list[Sequence]:
        """What sits in the slots, the oldest first; a sequence knows what it has sampled so far."""
        return list(self._slots.values())

    # ---- from outside -----------------------------------------------------------------------------------------------

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
        self._waiting.append(Sequence(request))

    def set_weights(self, params: dict[str, Any], version: int) -> None:
        """Hand over new weights; they take effect before the next block, or once drained (`on_publish`)."""
        newest = self.version if self._incoming is None else self._incoming[1]
        if version < newest:
            raise ValueError(f"weight version {version} after {newest}: versions never go back")
        self._incoming = (params, version)

    def cancel(self, request_ids: Iterable[int]) -> list[int]:
        """Give up requests, queued or running; returns the ids of those that were still here."""
        gone = set(request_ids)
        running = [slot for slot, sequence in self._slots.items() if sequence.request.request_id in gone]
        cancelled = [sequence.request.request_id for sequence in self._vacate(running)]
        cancelled += [s.request.request_id for s in self._waiting if s.request.request_id in gone]
        self._waiting = collections.deque(s for s in self._waiting if s.request.request_id not in gone)
        self._drop_idle_prefixes()
        return cancelled

    def cancel_all(self) -> list[int]:
        """Give up everything queued and running; returns the request ids."""
        return self.cancel(s.request.request_id for s in [*self._slots.values(), *self._waiting])

    def step(self) -> list[Rollout]:
        """Swap weights if some arrived, admit what fits, read prompts, decode one block; returns what ended in it."""
        self.swap_weights()
        if self._incoming is None:  # draining engines admit nothing
            self._admit()
        self._prefill()
        self._start()
        self._make_room()
        started = [slot for slot, sequence in self._slots.items() if sequence.is_started]
        self.ended = []
        if not started:
            return []
        rows = self._choose_rows(started)
        table = np.zeros((len(rows), self._table_width), np.int32)
        for row, slot in enumerate(started):
            pages = self._slots[slot].pages
            table[row, : len(pages)] = pages
        block = self._decode(rows, table)
        return self._collect(started, jax.tree.map(np.asarray, block))

    # ---- weights ----------------------------------------------------------------------------------------------------

    def swap_weights(self) -> None:
        """Take weights that arrived into use, unless running sequences have to end first; every step begins so."""
        if self._incoming is None or (self._config.on_publish == "drain" and self._slots):
            return
        self._params, self.version = self._incoming
        self.num_swaps += 1
        self._incoming = None
        # Arrivals read a prompt that the new weights have seen; who samples already keeps the pages that it has.
        reads_again = lambda s: self._config.on_publish == "recompute" or not s.is_started
        self._send_back([slot for slot, sequence in self._slots.items() if reads_again(sequence)])
        self._pages.drop_prefixes()

    # ---- what is compiled -------------------------------------------------------------------------------------------

    def shapes(self) -> list[tuple[str, int, int]]:
        """Every shape of the forward pass that a step may meet: (what, rows, tokens of a row)."""
        prefill = [("prefill", rows, width) for rows, width in self._prefill_shapes.all()]
        return prefill + [("decode", rows, self._config.decode_block) for rows in self._row_counts]

    def warm_up(self, report: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile all of `shapes`, and all else that a step calls. Needs weights; comes before the first request.

        Args:
          report: Called with the number of shapes done and their total.
        """
        self.swap_weights()
        shapes = self.shapes()
        self._enter({})
        self._stop([])
        for done, (what, rows, width) in enumerate(shapes):
            report(done, len(shapes))
            table = np.zeros((rows, self._table_width), np.int32)
            if what == "prefill":
                nothing = np.zeros(rows, np.int32)
                self._read(np.zeros((rows, width), np.int32), nothing, nothing, table)
            else:
                self._decode(np.arange(rows, dtype=np.int32), table)
        jax.block_until_ready(self._state)
        report(len(shapes), len(shapes))

    # ---- slots and pages --------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for slot in [slot for slot in range(self._config.num_slots) if slot not in self._slots]:
            # A page for each who runs stays free, so that an arrival does not push out somebody at the next block.
            if not (self._waiting and self._pages.open(self._waiting[0], num_reserved=len(self._slots))):
                break
            self._slots[slot] = self._waiting.popleft()
        self._drop_idle_prefixes()

    def _make_room(self) -> None:
        """Pages for the next block, for the oldest first; the youngest give way."""
        for slot, sequence in list(self._slots.items()):
            while self._slots.get(slot) is sequence and sequence.is_started and not self._pages.extend(sequence):
                self._pages.drop_prefixes()
                if not self._pages.extend(sequence):
                    self._send_back([next(reversed(self._slots))])
                    self.num_preempted += 1

    def _send_back(self, slots: list[int]) -> None:
        """Empty slots; their sequences go to the head of the queue, and read all their tokens again in time."""
        self._waiting.extendleft(reversed(self._vacate(slots)))

    def _vacate(self, slots: list[int]) -> list[Sequence]:
        sequences = [self._slots.pop(slot) for slot in slots]
        if any(sequence.is_started for sequence in sequences):
            self._stop(slots)
        for sequence in sequences:
            self._pages.close(sequence)
        return sequences

    def _stop(self, slots: list[int]) -> None:
        is_stopped = np.isin(np.arange(self._config.num_slots), slots)
        with self._turn:
            self._state = engine.EngineState(self._state.layers, engine.deactivate(self._state.slots, is_stopped))

    def _drop_idle_prefixes(self) -> None:
        self._pages.drop_prefixes(keep_for=self._waiting[0] if self._waiting else None)

    # ---- what the engine is told ------------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """Read the next chunk of the oldest prompts that are not read yet, those of like length together."""
        unread = self._pages.unread_prefixes()[: self._config.prefill_rows]
        lengths = [min(len(p.tokens) - p.num_written, self._config.prefill_chunk) for p in unread]
        for rows, width, chosen in self._prefill_shapes.plan(lengths):
            self._read_chunks(rows, width, [(unread[index], lengths[index]) for index in chosen])

    def _read_chunks(self, rows: int, width: int, chunks: list[tuple[Prefix, int]]) -> None:
        tokens, starts, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        table = np.zeros((rows, self._table_width), np.int32)
        for row, (prefix, count) in enumerate(chunks):
            start = prefix.num_written
            tokens[row, :count], starts[row], lengths[row] = prefix.tokens[start : start + count], start, count
            table[row, : len(prefix.pages)] = prefix.pages
            prefix.num_written += count
            self.num_prefilled += count
        self._read(tokens, starts, lengths, table)

    def _read(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, table: np.ndarray) -> None:
        with self._turn:
            self._state = engine.prefill(self.params, self._model, self._state, tokens, starts, lengths, table)

    def _decode(self, rows: np.ndarray, table: np.ndarray) -> engine.Block:
        with self._turn:
            self._state, block = engine.decode_block(
                self.params,
                self._model,
                self._state,
                rows,
                table,
                self._stop_ids,
                self._key,
                num_steps=self._config.decode_block,
                num_top=self._num_top,
            )
        return block

    def _start(self) -> None:
        """Let those sample whose prompt is read."""
        ready = {slot: s for slot, s in self._slots.items() if s.prefix is not None and s.prefix.is_complete}
        if ready:
            self._enter(ready)
            self._drop_idle_prefixes()

    def _enter(self, ready: dict[int, Sequence]) -> None:
        count, nowhere = self._config.num_slots, self.allocator.num_pages
        integers = {n: np.zeros(count, np.int32) for n in ("token", "position", "last_position", "top_k")}
        request_id = np.zeros(count, np.uint32)
        temperature, top_p = np.ones(count, np.float32), np.ones(count, np.float32)
        source, target = np.zeros(count, np.int32), np.full(count, nowhere, np.int32)
        for slot, sequence in ready.items():
            request, tokens = sequence.request, sequence.all_tokens()
            integers["token"][slot] = tokens[-1]
            integers["position"][slot] = len(tokens) - 1
            integers["last_position"][slot] = len(request.prompt_ids) + request.sampling.max_new_tokens - 1
            integers["top_k"][slot] = request.sampling.top_k
            request_id[slot] = request.request_id if request.random_id is None else request.random_id
            temperature[slot], top_p[slot] = request.sampling.temperature, request.sampling.top_p
            if (copied := self._pages.start(sequence)) is not None:
                source[slot], target[slot] = copied
        is_new = np.zeros(count, bool)
        is_new[list(ready)] = True
        floats = {"temperature": temperature, "top_p": top_p}
        arrivals = engine.Slots(**jax.device_put(integers | floats | {"request_id": request_id, "is_active": is_new}))
        with self._turn:
            self._state = engine.admit(self._state, arrivals, is_new, source, target)

    def _choose_rows(self, started: list[int]) -> Int32[np.ndarray, " R"]:
        """Slots of the next block, those that sample first; of few different numbers, since each is compiled."""
        num_rows = next(count for count in self._row_counts if count >= len(started))
        others = (slot for slot in range(self._config.num_slots) if slot not in started)
        return np.asarray([*started, *others][:num_rows], np.int32)

    def _collect(self, started: list[int], block: engine.Block) -> list[Rollout]:
        finished, columns = [], {slot: column for column, slot in enumerate(started)}
        for slot in [slot for slot in self._slots if slot in columns]:  # from the oldest to the youngest
            sequence, column = self._slots[slot], columns[slot]
            count = int(block.is_sampled[:, column].sum())
            sequence.tokens += block.tokens[:count, column].tolist()
            sequence.logprobs += block.logprob[:count, column].tolist()
            sequence.versions += [self.version] * count
            if self._num_top:
                top = block.top_tokens[:count, column].tolist(), block.top_logprobs[:count, column].tolist()
                sequence.alternatives += [list(zip(*places, strict=True)) for places in zip(*top, strict=True)]
            self.num_sampled += count
            has_stopped = sequence.tokens[-1] in self._stops
            if has_stopped or len(sequence.tokens) == sequence.request.sampling.max_new_tokens:
                finished.append(sequence.rollout(truncated=not has_stopped))
                self.ended.append(sequence)
                self._pages.close(self._slots.pop(slot))
        return finished
