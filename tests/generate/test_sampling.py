"""Drawing tokens: the inverse CDF against NumPy loops, truncation, and numbers that depend on a request alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from magistral_jax.generate.sampling import most_probable, request_uniform, sample

SAMPLE = jax.jit(sample)
UNIFORM = jax.jit(request_uniform)
NUM = 1024  # slots of every call, so that each vocabulary is compiled once; what is asked for comes first
LARGEST_UNIFORM = np.float32(1 - 2**-23)  # what jax.random.uniform can give at most


def draw(
    logits: Any, uniform: Any, temperature: Any = 1.0, top_p: Any = 1.0, top_k: Any = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`sample` with scalars spread over the slots, and slots of the last row's kind up to NUM."""
    slots = len(logits)
    fill = lambda values: jnp.asarray(np.concatenate([values, np.repeat(values[-1:], NUM - slots, axis=0)]))
    spread = lambda value, dtype: fill(np.broadcast_to(np.asarray(value, dtype), slots))
    token, logprob = SAMPLE(
        fill(np.asarray(logits, np.float32)),
        spread(uniform, np.float32),
        spread(temperature, np.float32),
        spread(top_p, np.float32),
        spread(top_k, np.int32),
    )
    return np.asarray(token)[:slots], np.asarray(logprob)[:slots]


def uniforms(seed: int, ids: Any, positions: Any) -> np.ndarray:
    """`request_uniform` on NUM slots."""
    count = len(ids)
    ids, positions = np.resize(np.asarray(ids, np.uint32), NUM), np.resize(np.asarray(positions, np.int32), NUM)
    return np.asarray(UNIFORM(jax.random.key(seed), jnp.asarray(ids), jnp.asarray(positions)))[:count]


def softmax(logits: Any, temperature: float = 1.0) -> np.ndarray:
    scaled = np.asarray(logits, np.float64) / temperature
    mass = np.exp(scaled - scaled.max())
    return mass / mass.sum()


def kept_by_loop(probability: np.ndarray, top_p: float, top_k: int) -> list[int]:
    """Ids of the nucleus, taken one by one from the most probable; float64."""
    kept, mass = [], 0.0
    for token in sorted(range(len(probability)), key=lambda t: -probability[t]):
        if kept and (mass >= top_p or (top_k and len(kept) == top_k)):
            break
        kept.append(token)
        mass += probability[token]
    return kept


@pytest.mark.parametrize("vocab", [1, 64, 70])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_follow_the_softmax(vocab: int, temperature: float):
    logits = np.random.default_rng(vocab).normal(size=vocab) * 2
    # An even grid of uniforms: the share of each token is its probability, to one grid cell (and rounding).
    num = NUM
    token, logprob = draw(np.tile(logits, (num, 1)), (np.arange(num) + 0.5) / num, temperature)
    expected = softmax(logits, temperature)
    share = np.bincount(token, minlength=vocab) / num
    np.testing.assert_allclose(share, expected, atol=1.01 / num)
    np.testing.assert_allclose(logprob, np.log(expected)[token], atol=2e-6)


def test_the_token_is_where_the_cumulative_sum_passes_the_uniform():
    rng = np.random.default_rng(0)
    logits, uniform = rng.normal(size=(NUM, 70)) * 3, rng.random(NUM)
    token, _ = draw(logits, uniform)
    cdf = np.cumsum([softmax(row) for row in logits], axis=-1)
    expected = (cdf <= uniform[:, None]).sum(axis=-1)
    distance = np.abs(cdf - uniform[:, None]).min(axis=-1)
    is_clear = distance > 1e-6  # nearer to a border float32 may round to the other side
    assert is_clear.mean() > 0.98
    np.testing.assert_array_equal(token[is_clear], expected[is_clear])


def test_temperature_zero_takes_the_most_probable_and_reports_its_log_prob_at_one():
    logits = np.random.default_rng(1).normal(size=(16, 70))
    token, logprob = draw(logits, np.linspace(0, 0.99, 16), temperature=0.0)
    np.testing.assert_array_equal(token, logits.argmax(axis=-1))
    expected = [np.log(softmax(row)[t]) for row, t in zip(logits, token, strict=True)]
    np.testing.assert_allclose(logprob, expected, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.3, 2.0, 8.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 10, 69, 70, 500]),
    temperature=st.sampled_from([0.5, 1.0, 1.5]),
)
def test_truncation_keeps_what_a_loop_keeps_and_renormalises_it(
    seed: int, scale: float, top_p: float, top_k: int, temperature: float
):
    logits = (np.random.default_rng(seed).normal(size=70) * scale).astype(np.float32)
    probability = softmax(logits, temperature)
    ordered = np.cumsum(np.sort(probability)[::-1])
    assume(np.abs(ordered - top_p).min() > 1e-5 or top_p == 1)  # the border itself is rounding
    kept = kept_by_loop(probability, top_p if top_p < 1 else 2.0, top_k)
    num = NUM
    token, logprob = draw(np.tile(logits, (num, 1)), (np.arange(num) + 0.5) / num, temperature, top_p, top_k)
    expected = np.zeros(70)
    expected[kept] = probability[kept] / probability[kept].sum()
    assert set(token) <= set(kept)
    np.testing.assert_allclose(np.bincount(token, minlength=70) / num, expected, atol=1.05 / num)
    # Log-probs are those of the whole distribution: the trainer knows nothing of truncation.
    np.testing.assert_allclose(logprob, np.log(probability)[token], atol=5e-6)


def test_impossible_tokens_are_never_drawn_however_the_sums_round():
    # Uniforms at, just below and just above each step of the exact CDF, where the two levels of float32 sums differ
    # in the last bit. Before tokens without mass were left out explicitly, one in 400 of these draws hit one.
    rng = np.random.default_rng(0)
    for _ in range(8):
        logits = (rng.normal(size=300) * 2).astype(np.float32)
        logits[rng.random(300) < 0.5] = -np.inf
        logits[-3:] = -np.inf
        steps = np.concatenate([[0.0], np.cumsum(softmax(logits))]).astype(np.float32)
        nudges = np.float32(2**-24) * np.arange(-3, 4, dtype=np.float32)
        uniform = np.clip(steps[:, None] + nudges, 0, LARGEST_UNIFORM).reshape(-1)
        uniform = rng.permutation(uniform)[:NUM]
        token, logprob = draw(np.tile(logits, (NUM, 1)), uniform)
        assert np.isfinite(logits[token]).all()
        assert np.isfinite(logprob).all()


@pytest.mark.parametrize("vocab", [2, 64, 70, 300])
@pytest.mark.parametrize("uniform", [0.0, LARGEST_UNIFORM])
def test_both_ends_of_the_unit_interval_give_possible_tokens(vocab: int, uniform: float):
    logits = np.full((1, vocab), -np.inf, np.float32)
    logits[0, 1] = 0.0  # the only possible token: with zeros before it, behind it, and padding after those
    token, logprob = draw(logits, uniform)
    assert token.tolist() == [1]
    assert logprob.tolist() == [0.0]


def test_truncated_tokens_are_never_drawn_at_the_ends():
    logits = np.arange(70, dtype=np.float32)[None] / 10
    for uniform in (0.0, LARGEST_UNIFORM):
        token, _ = draw(logits, uniform, top_k=3)
        assert token[0] in (67, 68, 69)


def test_equal_logits_at_the_border_of_top_k_all_stay():
    token, _ = draw(np.zeros((64, 2)), (np.arange(64) + 0.5) / 64, top_k=1)
    assert set(token) == {0, 1}


def test_nan_logits_name_a_token_of_the_vocabulary():
    token, _ = draw(np.full((1, 70), np.nan), 0.5)
    assert 0 <= token[0] < 70


def test_slots_do_not_notice_how_their_neighbours_sample():
    # A slot without truncation beside one with it: everything stays possible, to the least probable token.
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(32, 300)).astype(np.float32) * 4
    uniform = rng.random(32, np.float32)
    alone, alone_logprob = draw(logits, uniform)
    mixed, mixed_logprob = draw(
        logits,
        uniform,
        np.where(np.arange(32) % 2, 0.5, 1.0),
        np.where(np.arange(32) % 2, 0.3, 1.0),
        np.where(np.arange(32) % 2, 5, 0),
    )
    np.testing.assert_array_equal(alone[::2], mixed[::2])
    np.testing.assert_array_equal(alone_logprob[::2], mixed_logprob[::2])


def test_top_p_one_cuts_nothing_off_beside_a_truncating_neighbour():
    # Float32 sums of a row often pass 1 before its last, least probable tokens. Those must stay: they are what is
    # drawn at the very end of the cumulative sum.
    logits = np.sort(np.random.default_rng(5).normal(size=(NUM, 300)) * 4, axis=-1)[:, ::-1]
    truncates = np.arange(NUM) % 2 == 1
    token, _ = draw(logits, 1.0, top_p=np.where(truncates, 0.5, 1.0))
    alone, _ = draw(logits, 1.0)
    np.testing.assert_array_equal(token[~truncates], alone[~truncates])
    assert (token[truncates] < alone[truncates]).all()


def test_uniforms_depend_on_seed_request_and_position_only():
    ids, positions = (axis.ravel() for axis in np.meshgrid(np.arange(32), np.arange(32), indexing="ij"))
    uniform = uniforms(3, ids, positions)
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert len(np.unique(uniform)) > 1020  # 1024 draws of 2^23 values: hardly a chance collision
    # Uniform: the counts of 16 equal bins are within 5 standard deviations (7.7) of 64.
    assert np.abs(np.histogram(uniform, 16, (0, 1))[0] - 64).max() < 39
    order = np.random.default_rng(0).permutation(NUM)
    np.testing.assert_array_equal(uniforms(3, ids[order], positions[order]), uniform[order])
    np.testing.assert_array_equal(uniforms(3, ids[77:78], positions[77:78]), uniform[77:78])
    assert (uniforms(4, ids, positions) != uniform).all()


def test_request_ids_beyond_31_bits_have_their_own_numbers():
    assert len(set(uniforms(0, [1, 2**31 + 1, 2**32 - 1], [0, 0, 0]).tolist())) == 3


def test_the_most_probable_tokens_have_the_log_probs_that_samples_report():
    logits = np.log(np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.5, 0.2, 0.3]], np.float32))
    tokens, logprobs = most_probable(jnp.asarray(logits), jnp.asarray([1.0, 0.5, 0.0]), 2)
    assert tokens.tolist() == [[1, 2], [0, 2], [0, 2]]
    # At temperature 1/2 the masses are squared: 0.25, 0.04, 0.09 of 0.38. Greedy slots report temperature 1.
    expected = np.log([[0.6, 0.3], [0.25 / 0.38, 0.09 / 0.38], [0.5, 0.3]])
    np.testing.assert_allclose(logprobs, expected, atol=1e-6)
    none, _ = most_probable(jnp.asarray(logits), jnp.ones(3), 0)
    assert none.shape == (3, 0)
