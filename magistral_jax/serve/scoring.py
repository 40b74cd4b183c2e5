"""Log-probs of prompts under the engine's weights: one prompt at a time, a chunk at a time.

The same forward pass as for sampling, over pages of its own: two compiled shapes, memory for one prompt, and between
two chunks the engine decodes, so that a long prompt holds up nobody.
"""

import collections
import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.engine import init_state
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.pages import ONE_DEVICE, PagedCache, PageReader, Pages
from magistral_jax.policy.transformer import forward, logits
from magistral_jax.pytrees import pytree_dataclass

_LOGITS_AT_ONCE = 64  # tokens; also the narrower one of the two chunks


@dataclasses.dataclass(frozen=True)
class PromptScore:
    """For each token of a prompt but the first, given its predecessors and in nats: its log-prob, and the best one."""

    request_id: int
    logprob: Float32[np.ndarray, " T"]
    best_token: Int32[np.ndarray, " T"]
    best_logprob: Float32[np.ndarray, " T"]


@pytree_dataclass
class ChunkScore:
    """The same for a chunk, on the device."""

    logprob: Float[Array, " T"]
    best_token: Int[Array, " T"]
    best_logprob: Float[Array, " T"]


@dataclasses.dataclass(eq=False)
class _Prompt:
    request_id: int
    token_ids: Int32[np.ndarray, " T"]
    params: dict[str, Any] | None = None  # those of its first chunk, so that a score is of one version
    num_read: int = 0
    chunks: list[ChunkScore] = dataclasses.field(default_factory=list)


class PromptScorer:
    """Prompts to score, in order. Not thread-safe: it belongs to the thread of the engine."""

    def __init__(self, model: ModelConfig, config: GenerationConfig, reader: PageReader = ONE_DEVICE) -> None:
        self._model = model
        widest = -(-config.prefill_chunk // _LOGITS_AT_ONCE) * _LOGITS_AT_ONCE
        self._widths = sorted({_LOGITS_AT_ONCE, widest})
        self._layers = init_state(
            model,
            num_slots=1,
            num_pages=-(-config.max_prompt_tokens // config.page_size),
            page_size=config.page_size,
            dtype=jnp.dtype(config.kv_dtype),
            reader=reader,
        ).layers
        self._waiting: collections.deque[_Prompt] = collections.deque()
        self.num_scored = 0

    @property
    def num_waiting(self) -> int:
        """Prompts that are not scored yet."""
        return len(self._waiting)

    def submit(self, request_id: int, token_ids: Int32[np.ndarray, " T"]) -> None:
        """Queue a prompt, at most `generation.max_prompt_tokens` long."""
        self._waiting.append(_Prompt(request_id, token_ids))

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Forget prompts."""
        gone = set(request_ids)
        self._waiting = collections.deque(prompt for prompt in self._waiting if prompt.request_id not in gone)

    def advance(self, params: dict[str, Any]) -> list[PromptScore]:
        """Read a chunk of the first prompt; returns its score once all is read."""
        if not self._waiting:
            return []
        prompt = self._waiting[0]
        prompt.params = params if prompt.params is None else prompt.params
        start = prompt.num_read
        count = min(len(prompt.token_ids) - 1 - start, self._widths[-1])
        if count > 0:
            tokens = prompt.token_ids[start : start + count + 1]
            prompt.chunks.append(self._score(prompt.params, tokens[:-1], tokens[1:], start))
            prompt.num_read += count
        if prompt.num_read < len(prompt.token_ids) - 1:
            return []
        self._waiting.popleft()
        self.num_scored += len(prompt.token_ids)
        return [_collect(prompt)]

    def shapes(self) -> list[tuple[str, int, int]]:
        """Every shape that is compiled: (what, rows, tokens of a row)."""
        return [("score", 1, width) for width in self._widths]

    def warm_up(self, params: dict[str, Any]) -> None:
        """Compile both shapes."""
        for width in self._widths:
            nothing = np.zeros(width, np.int32)
            jax.block_until_ready(self._score(params, nothing, nothing, 0))

    def _score(self, params: dict[str, Any], tokens: np.ndarray, targets: np.ndarray, start: int) -> ChunkScore:
        width = next(width for width in self._widths if width >= len(tokens))
        padded = [np.pad(ids, (0, width - len(ids))) for ids in (tokens, targets)]
        self._layers, score = score_chunk(
            params, self._model, self._layers, *padded, np.int32(start), np.int32(len(tokens))
        )
        return score


def _collect(prompt: _Prompt) -> PromptScore:
    count = len(prompt.token_ids) - 1
    gather = lambda name, dtype: np.concatenate(
        [np.zeros(0, dtype), *(np.asarray(getattr(chunk, name)) for chunk in prompt.chunks)]
    )[:count]  # only the last chunk is padded
    return PromptScore(
        prompt.request_id,
        gather("logprob", np.float32),
        gather("best_token", np.int32),
        gather("best_logprob", np.float32),
    )


@partial(jax.jit, static_argnames="config", donate_argnames="layers")
def score_chunk(
    params: dict[str, Any],
    config: ModelConfig,
    layers: tuple[Pages, ...],
    tokens: Int[Array, " T"],
    targets: Int[Array, " T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> tuple[tuple[Pages, ...], ChunkScore]:
    """Score `targets[t]`, the token that follows `tokens[t]`; what lies before `start` has been read.

    Args:
      params: Weights, in the layout of decoding.
      config: Shape of the model.
      layers: Pages of the one prompt, in order; donated.
      tokens: Of the chunk, padded; a multiple of 64.
      targets: Aligned with `tokens`.
      start: Position of the first token.
      length: Tokens that are no padding.

    Returns:
      The pages, and the scores; those of padding mean nothing.
    """
    offsets = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    cache = PagedCache(layers, jnp.arange(layers[0].num_pages, dtype=jnp.int32)[None])
    is_live = (offsets < length).astype(jnp.int32)
    dtype = params["embed"]["embedding"].dtype
    hidden, cache = forward(params, config, tokens[None], (start + offsets)[None], is_live[None], cache, dtype=dtype)
    assert cache is not None

    def score(part: tuple[Array, Array]) -> ChunkScore:
        state, target = part
        logit = logits(params, config, state)
        normalizer = jax.nn.logsumexp(logit, axis=-1)
        best = jnp.argmax(logit, axis=-1).astype(jnp.int32)
        of = lambda token: jnp.take_along_axis(logit, token[:, None], axis=-1)[:, 0] - normalizer
        return ChunkScore(of(target), best, of(best))

    parts = (hidden[0].reshape(-1, _LOGITS_AT_ONCE, hidden.shape[-1]), targets.reshape(-1, _LOGITS_AT_ONCE))
    return cache.layers, jax.tree.map(jnp.ravel, jax.lax.map(score, parts))
