"""The update: its gradient does not depend on how the batch is cut, packed, padded, permuted or sharded."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.transformer import forward, init_params, logical_axes, logits
from magistral_jax.pytrees import Batch
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.config import LossConfig, OptimizerConfig
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import grpo_objective, init_state, make_train_step, score, sft_objective

MODEL = ModelConfig(vocab_size=29, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24)
POLICY = PolicyConfig(logprob_chunk=16)
LOSS = LossConfig()
PARAMS = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
OTHER_PARAMS = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(1))
# An "optimizer" that leaves the parameters alone and keeps the gradient as its state: what a step computes, exactly.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)
# Float32 sums in another order: gradients are of size 0.01 … 1.
close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)


@pytest.fixture(autouse=True)
def _compile_fast():
    """LLVM's optimisations make these programs no better at being right, and three times as slow to compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_sequences(lengths: Sequence[tuple[int, int]], seed: int = 0):
    """Sequences of (prompt, completion) lengths; behaviour near uniform, so that some ratios are clipped."""
    rng = np.random.default_rng(seed)
    return [
        TrainingSequence(
            prompt_ids=rng.integers(0, MODEL.vocab_size, num_prompt).astype(np.int32),
            completion_ids=rng.integers(0, MODEL.vocab_size, num_completion).astype(np.int32),
            behavior_logprob=(-np.log(MODEL.vocab_size) + rng.uniform(-1, 1, num_completion)).astype(np.float32),
            advantage=float(rng.normal()),
            staleness=rng.integers(0, 2, num_completion).astype(np.int32),
        )
        for num_prompt, num_completion in lengths
    ]


SEQUENCES = make_sequences([(2, 3), (3, 5), (2, 6), (4, 8), (1, 4), (3, 9), (6, 2), (2, 3)])
NUM_TRAINED = sum(len(s.completion_ids) for s in SEQUENCES)


@functools.cache
def recording_step(loss: LossConfig = LOSS, policy: PolicyConfig = POLICY, temperature: float = 1.0):
    return make_train_step(MODEL, policy, grpo_objective(loss), RECORDER, temperature=temperature)


def run(batch: Batch, loss: LossConfig = LOSS, reference: Any = None, params: Any = PARAMS, **kwargs: Any):
    """(gradient, metrics) of one step."""
    state = init_state(jax.tree.map(jnp.copy, params), RECORDER)
    state, metrics = recording_step(loss, **kwargs)(state, batch, reference)
    return state.opt_state, metrics


def cut(
    row_tokens: int = 24,
    rows_per_microbatch: int = 1,
    sequences: Sequence[TrainingSequence] | None = None,
    **kwargs: Any,
):
    sequences = SEQUENCES if sequences is None else sequences
    return collate(sequences, row_tokens=row_tokens, rows_per_microbatch=rows_per_microbatch, **kwargs)


def with_fields(batch: Batch, **fields: Any):
    return dataclasses.replace(batch, **{name: jnp.asarray(value) for name, value in fields.items()})


def descend(gradient: Any, size: float):
    return jax.tree.map(lambda p, g: p - size * g, PARAMS, gradient)


def difference(a: Any, b: Any):
    return jax.tree.map(jnp.subtract, a, b)


def norm(tree: Any):
    return float(optax.tree.norm(tree))


@jax.jit
def alone(params: Any, tokens: Array, num_prompt: int, behavior: np.ndarray, advantage: float, share: float):
    """Loss and gradient of one sequence: no rows, no padding, no chunks, all logits at once."""

    def total(params: Any):
        length = tokens.shape[1]
        hidden, _ = forward(params, MODEL, tokens, jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
        scores = jax.nn.log_softmax(logits(params, MODEL, hidden), axis=-1)[0, :-1]
        logprob = jnp.take_along_axis(scores, tokens[0, 1:, None], axis=1)[:, 0]
        ratio = jnp.exp(logprob - behavior)
        surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.28) * advantage)
        is_trained = jnp.arange(length - 1) >= num_prompt - 1
        return -jnp.sum(jnp.where(is_trained, surrogate, 0.0)) * share, jnp.where(is_trained, logprob, 0.0)

    return jax.value_and_grad(total, has_aux=True)(params)


@functools.cache
def each_alone(normalization: str = "token"):
    """(loss, gradient, sum of log-probs) of SEQUENCES, one after the other, divided once."""
    value, gradient, weight, logprob = 0.0, jax.tree.map(jnp.zeros_like, PARAMS), 0.0, 0.0
    for s in SEQUENCES:
        share = 1.0 if normalization == "token" else 1 / len(s.completion_ids)
        behavior = np.concatenate([np.zeros(len(s.prompt_ids) - 1, np.float32), s.behavior_logprob])
        tokens = jnp.asarray(np.concatenate([s.prompt_ids, s.completion_ids])[None])
        (part, scores), part_gradient = alone(PARAMS, tokens, len(s.prompt_ids), behavior, s.advantage, share)
        value, gradient = value + float(part), jax.tree.map(jnp.add, gradient, part_gradient)
        weight, logprob = weight + share * len(s.completion_ids), logprob + float(scores.sum())
    return value / weight, jax.tree.map(lambda g: g / weight, gradient), logprob


# --- cut, packing, padding, permutation ------------------------------------------------------------------------------


@pytest.mark.parametrize(("row_tokens", "rows"), [(24, 1), (12, 1), (32, 4)])
def test_any_cut_gives_the_loss_and_gradient_of_each_sequence_alone(row_tokens: int, rows: int):
    gradient, metrics = run(cut(row_tokens, rows))
    value, expected, _ = each_alone()
    close(float(metrics["loss"].mean()), value)
    jax.tree.map(close, gradient, expected)
    close(float(metrics["grad_norm"].mean()), norm(expected))


@pytest.mark.parametrize(("row_tokens", "rows"), [(12, 1), (32, 4)])
def test_any_cut_gives_the_same_metrics(row_tokens: int, rows: int):
    _, metrics = run(cut(row_tokens, rows))
    _, expected = run(cut())
    assert set(metrics) == {"loss", "grad_norm", "clip_fraction", "log_ratio", "entropy", "logprob_gap"}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), metrics, expected)
    assert 0.1 < float(metrics["clip_fraction"].mean()) < 0.9  # the example clips some tokens and not others
    num_fresh = sum(int((s.staleness == 0).sum()) for s in SEQUENCES)
    assert float(metrics["logprob_gap"].weight) == num_fresh


def test_normalization_by_sequence_too_does_not_depend_on_the_cut():
    value, expected, _ = each_alone("sequence")
    for row_tokens, rows in ((12, 1), (32, 4)):
        gradient, metrics = run(cut(row_tokens, rows, normalization="sequence"))
        close(float(metrics["loss"].mean()), value)
        jax.tree.map(close, gradient, expected)
    assert abs(value - each_alone()[0]) > 0.005  # and the two normalisations are not the same number


@pytest.mark.parametrize("bug", ["one segment", "positions run on"])
def test_the_values_that_packing_bugs_would_give_are_far_off(bug: str):
    batch = cut()
    if bug == "one segment":  # attention across the sequences of a row
        broken = with_fields(batch, segment_ids=jnp.minimum(batch.segment_ids, 1))
    else:  # a shift alone would not show: rotary positions are relative; so stretch them
        broken = with_fields(batch, positions=batch.positions * jnp.maximum(batch.segment_ids, 1))
    value, expected, _ = each_alone()
    gradient, metrics = run(broken)
    assert abs(float(metrics["loss"].mean()) - value) > 1e-4
    assert norm(difference(gradient, expected)) > 0.01 * norm(expected)


def test_positions_that_are_shifted_as_a_whole_change_nothing():
    batch = cut()
    gradient, _ = run(with_fields(batch, positions=batch.positions + 5 * batch.segment_ids))
    jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-5), gradient, each_alone()[1])


def test_order_of_sequences_and_microbatches_does_not_matter():
    order = np.random.default_rng(0).permutation(len(SEQUENCES))
    for batch in (cut(sequences=[SEQUENCES[i] for i in order]), jax.tree.map(lambda x: x[::-1], cut())):
        gradient, metrics = run(batch)
        jax.tree.map(close, gradient, each_alone()[1])
        close(float(metrics["loss"].mean()), each_alone()[0])


def test_empty_microbatches_change_nothing_wherever_they_are():
    batch = cut()
    assert batch.segment_ids.any(axis=(1, 2)).tolist() == [True, True, True, False]
    # Counting the used ones, instead of looking for the last, would drop the last microbatch here.
    order = np.array([0, 3, 1, 2])
    gradient, _ = run(jax.tree.map(lambda x: x[order], batch))
    jax.tree.map(close, gradient, each_alone()[1])


def test_what_stands_at_masked_positions_does_not_leak():
    batch = cut(32, 4)
    clean, metrics = run(batch)
    is_masked, is_padding = ~batch.loss_mask, batch.segment_ids == 0
    garbage = np.random.default_rng(1).integers(0, MODEL.vocab_size, batch.tokens.shape).astype(np.int32)
    spoiled = with_fields(
        batch,
        behavior_logprob=jnp.where(is_masked, jnp.nan, batch.behavior_logprob),
        advantage=jnp.where(is_masked, jnp.nan, batch.advantage),
        staleness=jnp.where(is_masked, -7, batch.staleness),
        tokens=jnp.where(is_padding, garbage, batch.tokens),
        positions=jnp.where(is_padding, garbage, batch.positions),
    )
    gradient, spoiled_metrics = run(spoiled)
    jax.tree.map(np.testing.assert_array_equal, gradient, clean)
    jax.tree.map(np.testing.assert_array_equal, spoiled_metrics, metrics)


def test_prompts_are_read_but_not_counted():
    others = [dataclasses.replace(s, prompt_ids=(s.prompt_ids + 1) % MODEL.vocab_size) for s in SEQUENCES]
    _, metrics = run(cut())
    _, other_metrics = run(cut(sequences=others))
    assert abs(float(other_metrics["log_ratio"].mean()) - float(metrics["log_ratio"].mean())) > 1e-4
    assert float(other_metrics["loss"].weight) == float(metrics["loss"].weight) == NUM_TRAINED


def test_a_batch_without_trained_tokens_has_gradient_0():
    batch = cut()
    off = with_fields(batch, loss_mask=jnp.zeros_like(batch.loss_mask), loss_weight=jnp.zeros_like(batch.loss_weight))
    gradient, metrics = run(off)
    assert norm(gradient) == 0
    assert float(metrics["loss"].mean()) == 0


def test_rematerialisation_changes_no_gradient():
    gradient, _ = run(cut(), policy=dataclasses.replace(POLICY, remat="full"))
    jax.tree.map(close, gradient, each_alone()[1])


def test_layers_without_a_loop_make_the_same_gradient():
    gradient, _ = run(cut(), policy=dataclasses.replace(POLICY, unroll=0))
    jax.tree.map(close, gradient, each_alone()[1])


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_gradients():
    gradient, metrics = run(cut(), policy=dataclasses.replace(POLICY, dtype="bfloat16"))
    value, expected, _ = each_alone()
    assert float(metrics["loss"].mean()) == pytest.approx(value, abs=0.02)
    assert norm(difference(gradient, expected)) < 0.1 * norm(expected)
    assert {str(x.dtype) for x in jax.tree.leaves(gradient)} == {"float32"}


# --- devices and tracing ---------------------------------------------------------------------------------------------


def test_rows_sharded_over_8_devices_equal_a_single_device():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, eps=1e-3, weight_decay=0.1), 10)
    step = make_train_step(MODEL, POLICY, grpo_objective(LOSS), optimizer)
    batch = cut(12, 8, sequences=[*SEQUENCES, *make_sequences([(3, 8), (5, 5), (2, 7)], seed=1)])
    single, metrics = step(init_state(jax.tree.map(jnp.copy, PARAMS), optimizer), batch, None)
    assert norm(difference(single.params, PARAMS)) > 0.05  # something has moved

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for sharded_axis, local_shape in ((None, (2, 16, 24)), ("embed", (2, 2, 24))):  # replicated, fully sharded
        place = lambda spec, a=sharded_axis: PartitionSpec(*("data" if a and x == a else None for x in spec))
        shardings = jax.tree.map(lambda s, p=place: NamedSharding(mesh, p(s)), logical_axes(MODEL), is_leaf=is_spec)
        params = jax.tree.map(jax.device_put, jax.tree.map(jnp.copy, PARAMS), shardings)
        assert params["layers"]["mlp"]["gate"]["kernel"].addressable_shards[0].data.shape == local_shape
        sharded, sharded_metrics = step(init_state(params, optimizer), rows, None)
        jax.tree.map(near, sharded.params, single.params)
        jax.tree.map(near, sharded_metrics, metrics)


def test_sft_fits_a_batch_without_a_retrace_consumes_the_state_and_reads_nothing_of_rl():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02), 30)
    step = make_train_step(MODEL, POLICY, sft_objective, optimizer)
    nothing = jnp.full(cut().advantage.shape, jnp.nan)
    batch = with_fields(cut(), advantage=nothing, behavior_logprob=nothing)
    # Another number of used microbatches is the same program, too: one of four instead of three of four.
    first_only = jax.tree.map(lambda x: jnp.where(jnp.arange(4)[:, None, None] == 0, x, jnp.zeros_like(x)), batch)
    fresh = init_state(jax.tree.map(jnp.copy, PARAMS), optimizer)
    state, metrics = step(fresh, batch, None)
    assert fresh.params["head"]["kernel"].is_deleted()  # donated: no second copy of parameters and moments
    # The mean negative log-likelihood over completion tokens, each sequence scored alone.
    assert float(metrics["loss"].mean()) == pytest.approx(-each_alone()[2] / NUM_TRAINED, rel=1e-5)
    with jax.no_tracing():
        state, fewer = step(state, first_only, None)
        for _ in range(28):
            state, metrics = step(state, batch, None)
    assert 0 < float(fewer["loss"].weight) < float(metrics["loss"].weight)
    assert float(metrics["loss"].mean()) < 0.5
    assert int(state.num_updates) == 30


def test_batches_of_any_lengths_meet_four_programs():
    step, rng = recording_step(), np.random.default_rng(0)

    def draw() -> Batch:
        """1 to 8 sequences of 2 to 24 tokens, in one row each or packed."""
        lengths = [(int(n), int(rng.integers(1, 25 - n))) for n in rng.integers(1, 24, rng.integers(1, 9))]
        return cut(24, 1, sequences=make_sequences(lengths, seed=int(rng.integers(1000))))

    state = init_state(jax.tree.map(jnp.copy, PARAMS), RECORDER)
    batches = [draw() for _ in range(60)]
    first = {batch.tokens.shape: batch for batch in batches}
    assert sorted(first) == [(1, 1, 24), (2, 1, 24), (4, 1, 24), (8, 1, 24)]  # powers of two and nothing else
    for batch in first.values():
        state, _ = step(state, batch, None)
    with jax.no_tracing():
        for batch in [*batches, *(draw() for _ in range(60))]:
            state, metrics = step(state, batch, None)
            assert np.isfinite(float(metrics["grad_norm"].total))


# --- what is learnt --------------------------------------------------------------------------------------------------


def test_log_probs_scored_at_the_same_shape_give_ratios_of_exactly_1():
    jax.config.update("jax_disable_most_optimizations", False)  # as it is compiled for users
    step = make_train_step(MODEL, POLICY, grpo_objective(LOSS), RECORDER)
    batch = cut(32, 2)
    scorer = jax.jit(lambda params, part: score(params, MODEL, POLICY, part, temperature=1.0)[0])
    parts = [jax.tree.map(lambda x, m=m: x[m], batch) for m in range(batch.tokens.shape[0])]
    old = jnp.stack([scorer(PARAMS, part) for part in parts])
    fresh = with_fields(batch, behavior_logprob=old, staleness=jnp.zeros_like(batch.staleness))
    _, metrics = step(init_state(jax.tree.map(jnp.copy, PARAMS), RECORDER), fresh, None)
    assert float(metrics["logprob_gap"].total) == 0.0  # a sum of absolute values: each one is 0
    assert float(metrics["clip_fraction"].total) == 0.0
    # With ratios of 1 the loss is minus the mean advantage over tokens.
    mean = sum(s.advantage * len(s.completion_ids) for s in SEQUENCES) / NUM_TRAINED
    assert float(metrics["loss"].mean()) == pytest.approx(-mean, rel=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_stop_token_is_trained(advantage: float):
    # Completions of one token, their stop token. Only the first has an advantage; the others fill up the shape.
    first, *others = make_sequences([(7, 1), (20, 1), (20, 1)], seed=2)
    tokens = jnp.asarray(np.concatenate([first.prompt_ids, first.completion_ids])[None])
    logprob = lambda params: alone(params, tokens, 7, np.zeros(7, np.float32), 0.0, 1.0)[0][1].sum()
    before = np.asarray(logprob(PARAMS))
    good_or_bad = dataclasses.replace(first, advantage=advantage, behavior_logprob=before[None])  # ratio 1: unclipped
    batch = cut(sequences=[good_or_bad, *(dataclasses.replace(s, advantage=0.0) for s in others)])
    gradient, _ = run(batch)
    assert (float(logprob(descend(gradient, 0.3))) - float(before)) * advantage > 0.01


def test_temperature_divides_the_logits_in_training_as_in_sampling():
    hot, metrics = run(cut(), temperature=2.0)
    halved = PARAMS | {"head": {"kernel": PARAMS["head"]["kernel"] / 2}}
    expected, expected_metrics = run(cut(), params=halved)
    close(float(metrics["loss"].mean()), float(expected_metrics["loss"].mean()))
    jax.tree.map(close, hot["layers"], expected["layers"])


def assert_only_loss_differs(metrics: Any, others: Any):
    for name in set(metrics) - {"loss", "grad_norm"}:
        np.testing.assert_allclose(float(others[name].total), float(metrics[name].total), rtol=1e-5)


def test_ablation_of_kl_adds_its_penalty_and_nothing_else():
    plain, metrics = run(cut())
    assert "kl" not in metrics  # without it no reference is needed, and none is reported
    penalised = LossConfig(kl_coef=0.5)
    with_term, with_kl = run(cut(), penalised, OTHER_PARAMS)
    kl = float(with_kl["kl"].mean())
    assert kl > 0.01
    assert float(with_kl["loss"].mean()) == pytest.approx(float(metrics["loss"].mean()) + 0.5 * kl, rel=1e-4)
    assert_only_loss_differs(metrics, with_kl)
    # A step down what the term adds to the gradient comes closer to the reference.
    closer = descend(difference(with_term, plain), 0.2)
    assert float(run(cut(), penalised, OTHER_PARAMS, closer)[1]["kl"].mean()) < kl - 1e-3
    # Against a reference that equals the policy the penalty is 0, and flat.
    itself, at_rest = run(cut(), penalised, PARAMS)
    assert float(at_rest["kl"].total) == pytest.approx(0, abs=1e-5)
    jax.tree.map(functools.partial(close, atol=1e-5), itself, plain)


def test_the_entropy_bonus_raises_entropy_and_adds_nothing_else():
    plain, metrics = run(cut())
    bonus, with_bonus = run(cut(), LossConfig(entropy_coef=0.5))
    entropy = float(metrics["entropy"].mean())
    assert float(with_bonus["loss"].mean()) == pytest.approx(float(metrics["loss"].mean()) - 0.5 * entropy, rel=1e-4)
    assert_only_loss_differs(metrics, with_bonus)
    direction = difference(bonus, plain)
    for sign in (1, -1):  # a step down the bonus' gradient raises entropy, a step up lowers it
        change = float(run(cut(), params=descend(direction, sign * 0.1))[1]["entropy"].mean()) - entropy
        assert change * sign > 1e-4


def test_ablation_of_clip_higher_reaches_the_step():
    gradient, metrics = run(cut())
    symmetric, symmetric_metrics = run(cut(), LossConfig(eps_high=0.2))
    assert float(symmetric_metrics["clip_fraction"].total) > float(metrics["clip_fraction"].total)
    assert norm(difference(symmetric, gradient)) > 1e-4
    for name in ("log_ratio", "entropy", "logprob_gap"):
        assert float(symmetric_metrics[name].total) == pytest.approx(float(metrics[name].total), rel=1e-6)
