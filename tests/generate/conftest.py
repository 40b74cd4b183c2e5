"""One tiny model for all tests of the engine, its trainer-side log-probs, and engines of a few fixed shapes."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.logprob import token_logprob
from magistral_jax.policy.transformer import forward, init_params, unstack
from magistral_jax.records import Rollout, SamplingParams

ROWS = 16  # rollouts scored in one call


class Tiny:
    """What the tests of this folder share. All engines have the same shapes unless told otherwise: few compilations."""

    # Grouped queries: two query heads to a KV head. 70 tokens: no multiple of the sampler's block.
    model = ModelConfig(vocab_size=70, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=48)
    engine = GenerationConfig(
        num_slots=4, page_size=4, max_prompt_tokens=12, max_new_tokens=12, decode_block=3, prefill_rows=2
    )

    @functools.cache  # noqa: B019
    def params(self, seed: int, config: ModelConfig = model) -> dict[str, Any]:
        """Weights in the layout of decoding; other seeds are other weights. NumPy draws them: nothing to compile."""
        rng = np.random.default_rng(seed)
        fill = lambda leaf: rng.normal(1.0 if leaf.ndim == 1 else 0.0, 0.2, leaf.shape)
        shapes = jax.eval_shape(lambda: unstack(init_params(config, jax.random.key(0)), config))
        return jax.tree.map(lambda leaf: jnp.asarray(fill(leaf), jnp.float32), shapes)

    def trainer_logprob(
        self, weights: dict[str, Any], rollouts: Sequence[Rollout], temperature: float = 1.0
    ) -> list[np.ndarray]:
        """Log-probs of completions as the trainer computes them: one full forward, no cache, rows padded."""
        assert len(rollouts) <= ROWS
        longest = self.engine.max_prompt_tokens + self.engine.max_new_tokens
        tokens, segments = np.zeros((2, ROWS, longest), np.int32)
        for row, rollout in enumerate(rollouts):
            tokens[row, : rollout.num_tokens] = np.concatenate([rollout.prompt_ids, rollout.completion_ids])
            segments[row, : rollout.num_tokens] = 1
        positions = np.tile(np.arange(longest, dtype=np.int32), (ROWS, 1))
        logprob = np.asarray(_score(weights, tokens, positions, segments, temperature))
        return [logprob[row, len(r.prompt_ids) : r.num_tokens] for row, r in enumerate(rollouts)]

    def batcher(
        self, *, stop_ids: tuple[int, ...] = (0, 1, 2), seed: int = 0, weights: bool = True, **changes: Any
    ) -> ContinuousBatcher:
        """A batcher with weights (version 0, seed 0) unless told otherwise."""
        config = GenerationConfig(**(vars(self.engine) | changes))
        batcher = ContinuousBatcher(self.model, config, stop_ids, seed)
        if weights:
            batcher.set_weights(self.params(0), 0)
        return batcher

    def request(
        self,
        request_id: int,
        prompt: Any,
        *,
        prompt_seed: int | None = None,
        max_new_tokens: int = 12,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> GenerationRequest:
        """A request with a prompt given, or of a length, then drawn from its seed."""
        if isinstance(prompt, int):
            rng = np.random.default_rng(request_id if prompt_seed is None else prompt_seed)
            prompt = rng.integers(0, self.model.vocab_size, prompt)
        sampling = SamplingParams(temperature, top_p, top_k, max_new_tokens)
        return GenerationRequest(request_id, np.asarray(prompt, np.int32), sampling)

    def finish(
        self, batcher: ContinuousBatcher, requests: Sequence[GenerationRequest] = (), max_steps: int = 300
    ) -> dict[int, Rollout]:
        """Step until everything has ended; a bound on the steps makes a deadlock fail."""
        for request in requests:
            batcher.submit(request)
        rollouts: dict[int, Rollout] = {}
        for _ in range(max_steps):
            if batcher.num_running == batcher.num_waiting == 0:
                return rollouts
            for rollout in batcher.step():
                assert rollout.request_id not in rollouts
                rollouts[rollout.request_id] = rollout
        raise AssertionError(f"no end: {batcher.num_running} running, {batcher.num_waiting} waiting")

    @staticmethod
    def stack(weights: dict[str, Any]) -> dict[str, Any]:
        """The same weights in the layout of training."""
        return weights | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights["layers"])}


@functools.partial(jax.jit, static_argnames="temperature")
def _score(params: dict[str, Any], tokens: Any, positions: Any, segment_ids: Any, temperature: float) -> jax.Array:
    stacked = Tiny.stack(params)
    hidden, _ = forward(stacked, Tiny.model, tokens, positions, segment_ids)
    return token_logprob(stacked, Tiny.model, hidden, tokens, temperature=temperature)[0]


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()
