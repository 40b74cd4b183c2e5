"""Log-probs of prompts: those of the trainer, whatever their length, of one version of weights, in few shapes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.generate.config import GenerationConfig
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.logprob import token_logprob
from magistral_jax.policy.transformer import forward, init_params, logits, unstack
from magistral_jax.serve.scoring import PromptScore, PromptScorer

MODEL = ModelConfig(vocab_size=70, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48)
CONFIG = GenerationConfig(page_size=8, max_prompt_tokens=200, max_new_tokens=8, prefill_chunk=100)


@functools.cache
def params(seed: int) -> Any:
    return init_params(MODEL, jax.random.key(seed))


def serving(seed: int) -> Any:
    return unstack(params(seed), MODEL)


def prompt(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, MODEL.vocab_size, length).astype(np.int32)


@pytest.fixture(scope="module")
def scorer() -> PromptScorer:
    scorer = PromptScorer(MODEL, CONFIG)
    scorer.warm_up(serving(0))
    return scorer


def finish(scorer: PromptScorer, weights: Any) -> list[PromptScore]:
    done: list[PromptScore] = []
    while scorer.num_waiting:
        done += scorer.advance(weights)
    return done


def trainer(weights: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log-probs as the trainer computes them, all logits) of one row."""
    row = jnp.asarray(ids)[None]
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    hidden, _ = forward(weights, MODEL, row, positions, jnp.ones_like(row))
    return np.asarray(token_logprob(weights, MODEL, hidden, row)[0])[0], np.asarray(logits(weights, MODEL, hidden))[0]


def test_scores_are_the_trainers_log_probs(scorer: PromptScorer):
    lengths = [2, 64, 65, 129, 200]  # one chunk, its exact width, one token more, two chunks, the longest
    for index, length in enumerate(lengths):
        scorer.submit(index, prompt(length))
    scores = finish(scorer, serving(0))
    assert [score.request_id for score in scores] == list(range(len(lengths)))
    for length, score in zip(lengths, scores, strict=True):
        logprob, logit = trainer(params(0), prompt(length))
        np.testing.assert_allclose(score.logprob, logprob[1:], atol=2e-5)
        best = logit[:-1].argmax(axis=-1)
        np.testing.assert_array_equal(score.best_token, best)
        is_greedy = prompt(length)[1:] == best
        np.testing.assert_array_equal(score.best_logprob == score.logprob, is_greedy)
        assert (score.best_logprob >= score.logprob).all()


def test_a_single_token_has_nothing_before_it(scorer: PromptScorer):
    scorer.submit(7, prompt(1))
    (score,) = finish(scorer, serving(0))
    assert len(score.logprob) == len(score.best_token) == len(score.best_logprob) == 0


def test_a_score_is_of_the_weights_of_its_first_chunk(scorer: PromptScorer):
    scorer.submit(0, prompt(200))
    assert scorer.advance(serving(0)) == []  # the rest of it meets new weights
    (score,) = finish(scorer, serving(1))
    np.testing.assert_allclose(score.logprob, trainer(params(0), prompt(200))[0][1:], atol=2e-5)
    scorer.submit(1, prompt(200))
    (score,) = finish(scorer, serving(1))
    np.testing.assert_allclose(score.logprob, trainer(params(1), prompt(200))[0][1:], atol=2e-5)


def test_a_cancelled_prompt_is_forgotten(scorer: PromptScorer):
    for index in range(3):
        scorer.submit(index, prompt(200))
    scorer.advance(serving(0))
    scorer.cancel([0, 2])
    assert [score.request_id for score in finish(scorer, serving(0))] == [1]


def test_after_the_warm_up_nothing_is_compiled(scorer: PromptScorer):
    assert scorer.shapes() == [("score", 1, 64), ("score", 1, 128)]
    for index, length in enumerate([3, 17, 100, 199]):
        scorer.submit(index, prompt(length))
    weights = serving(1)
    with jax.no_tracing():
        finish(scorer, weights)


def test_a_small_chunk_is_no_wider_than_a_wide_one():
    assert PromptScorer(MODEL, dataclasses.replace(CONFIG, prefill_chunk=8)).shapes() == [("score", 1, 64)]
