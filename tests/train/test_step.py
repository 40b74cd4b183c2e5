"""The update: its gradient does not depend on how the batch is cut, packed, padded, permuted or sharded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.transformer import forward, init_params, logical_axes, logits
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.config import LossConfig, OptimizerConfig
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import grpo_objective, init_state, make_train_step, score, sft_objective

MODEL = ModelConfig(vocab_size=29, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24)
POLICY = PolicyConfig(logprob_chunk=16)
PARAMS = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
OTHER_PARAMS = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(1))
# An "optimizer" that leaves the parameters alone and keeps the gradient as its state: what a step computes, exactly.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradients, state, params=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)
# Float32 sums in another order: gradients are of size 0.01 … 1.
close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)


def make_sequences(lengths, seed=0):
    """Sequences of (prompt, completion) lengths; uniform-ish behaviour, so that some ratios are clipped."""
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


@functools.cache
def recording_step(loss=LossConfig(), policy=POLICY, temperature=1.0):
    objective = sft_objective if loss is None else grpo_objective(loss)
    return make_train_step(MODEL, policy, objective, RECORDER, temperature=temperature)


def run(batch, loss=LossConfig(), reference=None, params=PARAMS, **kwargs):
    """(gradient, metrics) of one step."""
    state = init_state(jax.tree.map(jnp.copy, params), RECORDER)
    state, metrics = recording_step(loss, **kwargs)(state, batch, reference)
    return state.opt_state, metrics


def cut(row_tokens=24, rows_per_microbatch=1, sequences=None, **kwargs):
    sequences = SEQUENCES if sequences is None else sequences
    return collate(sequences, row_tokens=row_tokens, rows_per_microbatch=rows_per_microbatch, **kwargs)


def with_fields(batch, **fields):
    return dataclasses.replace(batch, **{name: jnp.asarray(value) for name, value in fields.items()})


def assert_trees(check, a, b):
    jax.tree.map(check, a, b)


def norm(tree):
    return float(optax.tree.norm(tree))


@functools.cache
def plain_value_and_grad(normalization="token"):
    """Loss and gradient of SEQUENCES with neither rows, padding, masks nor chunks: each alone, all logits at once."""

    @jax.jit
    def alone(params, tokens, num_prompt, behavior, advantage, share):
        def total(params):
            length = tokens.shape[1]
            hidden, _ = forward(params, MODEL, tokens, jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
            scores = jax.nn.log_softmax(logits(params, MODEL, hidden), axis=-1)[0, :-1]
            logprob = jnp.take_along_axis(scores, tokens[0, 1:, None], axis=1)[:, 0]
            ratio = jnp.exp(logprob - behavior)
            surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.28) * advantage)
            is_trained = jnp.arange(length - 1) >= num_prompt - 1
            return -jnp.sum(jnp.where(is_trained, surrogate, 0.0)) * share

        return jax.value_and_grad(total)(params)

    value, gradient, weight = 0.0, jax.tree.map(jnp.zeros_like, PARAMS), 0.0
    for s in SEQUENCES:
        share = 1.0 if normalization == "token" else 1 / len(s.completion_ids)
        behavior = np.concatenate([np.zeros(len(s.prompt_ids) - 1, np.float32), s.behavior_logprob])
        tokens = np.concatenate([s.prompt_ids, s.completion_ids])[None]
        part, part_gradient = alone(PARAMS, tokens, len(s.prompt_ids), behavior, s.advantage, share)
        value, gradient = value + float(part), jax.tree.map(jnp.add, gradient, part_gradient)
        weight += share * len(s.completion_ids)
    return value / weight, jax.tree.map(lambda g: g / weight, gradient)


# --- cut, packing, padding, permutation ------------------------------------------------------------------------------


@pytest.mark.parametrize(("row_tokens", "rows"), [(12, 1), (16, 2), (24, 1), (32, 4), (64, 1), (21, 3)])
def test_any_cut_gives_the_loss_and_gradient_of_each_sequence_alone(row_tokens, rows):
    gradient, metrics = run(cut(row_tokens, rows))
    value, expected = plain_value_and_grad()
    close(float(metrics["loss"].mean()), value)
    assert_trees(close, gradient, expected)
    close(float(metrics["grad_norm"].mean()), norm(expected))


@pytest.mark.parametrize(("row_tokens", "rows"), [(12, 1), (32, 4)])
def test_any_cut_gives_the_same_metrics(row_tokens, rows):
    _, metrics = run(cut(row_tokens, rows))
    _, expected = run(cut())
    assert set(metrics) == {"loss", "grad_norm", "clip_fraction", "log_ratio", "entropy", "logprob_gap"}
    assert_trees(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), metrics, expected)
    assert 0.1 < float(metrics["clip_fraction"].mean()) < 0.9  # the example clips some tokens and not others
    num_fresh = sum(int((s.staleness == 0).sum()) for s in SEQUENCES)
    assert float(metrics["logprob_gap"].weight) == num_fresh


def test_normalization_by_sequence_too_does_not_depend_on_the_cut():
    value, expected = plain_value_and_grad("sequence")
    for row_tokens, rows in ((12, 1), (32, 4)):
        gradient, metrics = run(cut(row_tokens, rows, normalization="sequence"))
        close(float(metrics["loss"].mean()), value)
        assert_trees(close, gradient, expected)
    by_token, _ = plain_value_and_grad()
    assert abs(value - by_token) > 0.005  # and the two normalisations are not the same number


@pytest.mark.parametrize("bug", ["one segment", "positions run on"])
def test_the_values_that_packing_bugs_would_give_are_far_off(bug):
    batch = cut(24)
    if bug == "one segment":  # attention across sequences
        broken = with_fields(batch, segment_ids=jnp.minimum(batch.segment_ids, 1))
    else:  # distances within a sequence stay the same under rotary positions, so stretch them
        broken = with_fields(batch, positions=batch.positions * jnp.maximum(batch.segment_ids, 1))
    value, expected = plain_value_and_grad()
    gradient, metrics = run(broken)
    assert abs(float(metrics["loss"].mean()) - value) > 1e-4
    assert norm(jax.tree.map(jnp.subtract, gradient, expected)) > 0.05 * norm(expected)


def test_order_of_sequences_rows_and_microbatches_does_not_matter():
    expected, expected_metrics = run(cut(24))
    rng = np.random.default_rng(0)
    shuffled = cut(24, sequences=[SEQUENCES[i] for i in rng.permutation(len(SEQUENCES))])
    moved = jax.tree.map(lambda x: x[rng.permutation(len(x))] if False else x[::-1], cut(24))
    for batch in (shuffled, moved):
        gradient, metrics = run(batch)
        assert_trees(close, gradient, expected)
        close(float(metrics["loss"].mean()), float(expected_metrics["loss"].mean()))


def test_empty_microbatches_change_nothing_wherever_they_are():
    batch = cut(24)
    assert batch.tokens.shape[0] == 4
    assert int(batch.segment_ids.any(axis=(1, 2)).sum()) == 3
    expected, _ = run(batch)
    # Counting the used ones instead of looking for the last would drop the last microbatch here.
    order = np.array([0, 3, 1, 2])
    gradient, _ = run(jax.tree.map(lambda x: x[order], batch))
    assert_trees(close, gradient, expected)


def test_what_stands_at_masked_positions_does_not_leak():
    batch = cut(32, 4)
    clean, metrics = run(batch)
    is_masked = np.asarray(~batch.loss_mask)
    is_padding = np.asarray(batch.segment_ids == 0)
    rng = np.random.default_rng(1)
    garbage = rng.integers(0, MODEL.vocab_size, batch.tokens.shape).astype(np.int32)
    spoiled = with_fields(
        batch,
        behavior_logprob=jnp.where(is_masked, jnp.nan, batch.behavior_logprob),
        advantage=jnp.where(is_masked, jnp.nan, batch.advantage),
        staleness=jnp.where(is_masked, -7, batch.staleness),
        tokens=jnp.where(is_padding, garbage, batch.tokens),
        positions=jnp.where(is_padding, garbage, batch.positions),
    )
    gradient, spoiled_metrics = run(spoiled)
    # Bit for bit, but for the head's sums over padded positions, which are sums of zeros.
    assert_trees(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), gradient, clean)
    assert_trees(functools.partial(np.testing.assert_allclose, rtol=1e-6), spoiled_metrics, metrics)


def test_prompt_tokens_are_read_but_not_trained():
    (sequence,) = make_sequences([(4, 4)])
    gradient, metrics = run(cut(8, sequences=[sequence]))
    assert float(metrics["loss"].weight) == 4
    # Another prompt changes the prediction of the completion …
    other = dataclasses.replace(sequence, prompt_ids=(sequence.prompt_ids + 1) % MODEL.vocab_size)
    assert float(run(cut(8, sequences=[other]))[1]["loss"].total) != float(metrics["loss"].total)
    # … but the head never learns a token because it stands in the prompt: the gradient of its logit at the prompt's
    # positions is 0, so the columns of tokens not in the completion only see −p, whose sign is the advantage's.
    assert np.isfinite(norm(gradient))


def test_a_batch_without_trained_tokens_has_gradient_0():
    batch = cut(24)
    off = with_fields(
        batch, loss_mask=jnp.zeros_like(batch.loss_mask), loss_weight=jnp.zeros_like(batch.loss_weight)
    )
    gradient, metrics = run(off)
    assert norm(gradient) == 0
    assert float(metrics["loss"].mean()) == 0


def test_rematerialisation_changes_no_gradient():
    gradient, _ = run(cut(32, 4), policy=dataclasses.replace(POLICY, remat="full"))
    assert_trees(close, gradient, plain_value_and_grad()[1])


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_gradients():
    gradient, metrics = run(cut(32, 4), policy=dataclasses.replace(POLICY, dtype="bfloat16"))
    value, expected = plain_value_and_grad()
    assert float(metrics["loss"].mean()) == pytest.approx(value, abs=0.02)
    assert norm(jax.tree.map(jnp.subtract, gradient, expected)) < 0.1 * norm(expected)
    assert {str(x.dtype) for x in jax.tree.leaves(gradient)} == {"float32"}


# --- devices and tracing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["replicated", "fsdp"])
def test_rows_sharded_over_8_devices_equal_a_single_device(parameters):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, eps=1e-3, weight_decay=0.1), 10)
    step = make_train_step(MODEL, POLICY, grpo_objective(LossConfig()), optimizer)
    batch = cut(12, 8, sequences=[*SEQUENCES, *make_sequences([(3, 8), (5, 5), (2, 7)], seed=1)])
    single, metrics = step(init_state(jax.tree.map(jnp.copy, PARAMS), optimizer), batch, None)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    place = lambda spec: PartitionSpec(*("data" if axis == "embed" and parameters == "fsdp" else None for axis in spec))
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, place(s)), logical_axes(MODEL), is_leaf=is_spec)
    params = jax.tree.map(jax.device_put, jax.tree.map(jnp.copy, PARAMS), shardings)
    shard = params["layers"]["mlp"]["gate"]["kernel"].addressable_shards[0].data.shape
    assert shard == (2, 2 if parameters == "fsdp" else 16, 24)
    rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
    sharded, sharded_metrics = step(init_state(params, optimizer), rows, None)

    assert_trees(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), sharded.params, single.params)
    assert_trees(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), sharded_metrics, metrics)
    assert norm(jax.tree.map(jnp.subtract, single.params, PARAMS)) > 0.05  # and something has moved


def test_another_batch_of_the_same_shape_is_not_traced_again():
    optimizer = make_optimizer(OptimizerConfig(), 10)
    step = make_train_step(MODEL, POLICY, grpo_objective(LossConfig()), optimizer)
    state, _ = step(init_state(jax.tree.map(jnp.copy, PARAMS), optimizer), cut(24), None)
    # Another number of used microbatches, too: one of four instead of three of four.
    fewer = jax.tree.map(lambda x: jnp.where(jnp.arange(4)[:, None, None] == 0, x, jnp.zeros_like(x)), cut(24))
    with jax.no_tracing():
        state, _ = step(state, fewer, None)
    assert int(state.num_updates) == 2


def test_the_state_is_consumed():
    optimizer = make_optimizer(OptimizerConfig(), 10)
    step = make_train_step(MODEL, POLICY, grpo_objective(LossConfig()), optimizer)
    before = init_state(jax.tree.map(jnp.copy, PARAMS), optimizer)
    step(before, cut(24), None)
    assert before.params["head"]["kernel"].is_deleted()  # no second copy of parameters and moments


# --- what is learnt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row_tokens", "rows"), [(24, 1), (32, 4)])
def test_log_probs_scored_at_the_same_shape_give_ratios_of_exactly_1(row_tokens, rows):
    batch = cut(row_tokens, rows)
    scorer = jax.jit(lambda params, part: score(params, MODEL, POLICY, part, temperature=1.0)[0])
    parts = [jax.tree.map(lambda x, m=m: x[m], batch) for m in range(batch.tokens.shape[0])]
    old = jnp.stack([scorer(PARAMS, part) for part in parts])
    fresh = with_fields(batch, behavior_logprob=old, staleness=jnp.zeros_like(batch.staleness))
    gradient, metrics = run(fresh)
    assert float(metrics["logprob_gap"].total) == 0.0
    assert float(metrics["clip_fraction"].total) == 0.0
    # With ratio 1 the loss is −mean of the advantages over tokens, and its gradient that of −A·logprob.
    mean = sum(s.advantage * len(s.completion_ids) for s in SEQUENCES) / float(batch.loss_weight.sum())
    assert float(metrics["loss"].mean()) == pytest.approx(-mean, rel=1e-5)

    def surrogate(params):
        logprob = jnp.stack([score(params, MODEL, POLICY, part, temperature=1.0)[0] for part in parts])
        return -jnp.sum(jnp.where(batch.loss_mask, logprob * batch.advantage, 0.0)) / batch.loss_weight.sum()

    assert_trees(close, gradient, jax.jit(jax.grad(surrogate))(PARAMS))


def test_the_stop_token_is_trained():
    # A completion that is nothing but its stop token: good ones must become likelier, bad ones less likely.
    for advantage in (1.0, -1.0):
        sequence = TrainingSequence(
            prompt_ids=np.array([1, 2, 3], np.int32),
            completion_ids=np.array([7], np.int32),
            behavior_logprob=np.array([-3.4], np.float32),
            advantage=advantage,
            staleness=np.zeros(1, np.int32),
        )
        batch = cut(8, sequences=[sequence])
        gradient, _ = run(batch)
        stop = lambda params: float(
            score(params, MODEL, POLICY, jax.tree.map(lambda x: x[0], batch), temperature=1.0)[0][0, 3]
        )
        after = stop(jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, gradient))
        assert (after - stop(PARAMS)) * advantage > 0.01


def test_temperature_divides_the_logits_in_training_as_in_sampling():
    hot, metrics = run(cut(24), temperature=2.0)
    halved = PARAMS | {"head": {"kernel": PARAMS["head"]["kernel"] / 2}}
    expected, expected_metrics = run(cut(24), params=halved)
    close(float(metrics["loss"].mean()), float(expected_metrics["loss"].mean()))
    assert_trees(close, hot["layers"], expected["layers"])


def test_ablation_of_kl_adds_its_penalty_and_nothing_else():
    batch = cut(24)
    plain, metrics = run(batch)
    without, same_metrics = run(batch, LossConfig(kl_coef=0.0), OTHER_PARAMS)
    assert_trees(close, without, plain)  # the coefficient scales the whole term
    kl = float(same_metrics["kl"].mean())
    assert kl > 0.01
    gradients = {}
    for coefficient in (0.5, 1.0):
        gradients[coefficient], with_kl = run(batch, LossConfig(kl_coef=coefficient), OTHER_PARAMS)
        assert float(with_kl["loss"].mean()) == pytest.approx(float(metrics["loss"].mean()) + coefficient * kl, rel=1e-4)
        for name in set(metrics) - {"loss", "grad_norm"}:
            np.testing.assert_allclose(float(with_kl[name].total), float(metrics[name].total), rtol=1e-5)
    extra = {c: jax.tree.map(jnp.subtract, g, plain) for c, g in gradients.items()}
    assert_trees(lambda a, b: close(2 * np.asarray(a), b, atol=1e-5), extra[0.5], extra[1.0])
    # Against a reference that equals the policy the penalty is 0, and flat.
    itself, at_rest = run(batch, LossConfig(kl_coef=1.0), PARAMS)
    assert float(at_rest["kl"].total) == pytest.approx(0, abs=1e-5)
    assert_trees(functools.partial(close, atol=1e-5), itself, plain)


def test_without_kl_no_reference_is_needed_and_none_is_reported():
    _, metrics = run(cut(24))
    assert "kl" not in metrics


def test_a_step_against_the_kl_gradient_comes_closer_to_the_reference():
    still = with_fields(cut(24), advantage=jnp.zeros(cut(24).advantage.shape))
    gradient, before = run(still, LossConfig(kl_coef=1.0), OTHER_PARAMS)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, gradient)
    _, after = run(still, LossConfig(kl_coef=1.0), OTHER_PARAMS, params=moved)
    assert float(after["kl"].mean()) < float(before["kl"].mean())


def test_the_entropy_bonus_raises_entropy_and_adds_nothing_else():
    batch = cut(24)
    plain, metrics = run(batch)
    bonus, with_bonus = run(batch, LossConfig(entropy_coef=0.5))
    entropy = float(metrics["entropy"].mean())
    assert float(with_bonus["loss"].mean()) == pytest.approx(float(metrics["loss"].mean()) - 0.5 * entropy, rel=1e-4)
    for name in set(metrics) - {"loss", "grad_norm"}:
        np.testing.assert_allclose(float(with_bonus[name].total), float(metrics[name].total), rtol=1e-5)
    direction = jax.tree.map(jnp.subtract, bonus, plain)
    for sign in (1, -1):  # a step down the bonus' gradient raises entropy, a step up lowers it
        moved = jax.tree.map(lambda p, g, s=sign: p - s * 0.1 * g, PARAMS, direction)
        change = float(run(batch, params=moved)[1]["entropy"].mean()) - entropy
        assert change * sign > 1e-4


def test_ablation_of_clip_higher_reaches_the_step():
    gradient, metrics = run(cut(24))
    symmetric, symmetric_metrics = run(cut(24), LossConfig(eps_high=0.2))
    assert float(symmetric_metrics["clip_fraction"].total) > float(metrics["clip_fraction"].total)
    assert norm(jax.tree.map(jnp.subtract, symmetric, gradient)) > 1e-4
    for name in ("log_ratio", "entropy", "logprob_gap"):
        assert float(symmetric_metrics[name].total) == float(metrics[name].total)


def test_sft_is_the_mean_negative_log_likelihood_and_reads_nothing_of_rl():
    nothing = jnp.full(cut(24).advantage.shape, jnp.nan)
    gradient, metrics = run(with_fields(cut(24), advantage=nothing, behavior_logprob=nothing), None)
    total = 0.0
    for s in SEQUENCES:
        tokens = jnp.asarray(np.concatenate([s.prompt_ids, s.completion_ids]))[None]
        length = tokens.shape[1]
        hidden, _ = jax.jit(forward, static_argnums=1)(
            PARAMS, MODEL, tokens, jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)
        )
        scores = np.asarray(jax.nn.log_softmax(logits(PARAMS, MODEL, hidden)))[0]
        for t in range(len(s.prompt_ids), length):
            total -= scores[t - 1, int(tokens[0, t])]
    assert float(metrics["loss"].mean()) == pytest.approx(total / float(metrics["loss"].weight), rel=1e-5)
    other_cut, _ = run(cut(12), None)
    assert_trees(close, gradient, other_cut)


def test_updates_fit_a_batch():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02), 30)
    step = make_train_step(MODEL, POLICY, sft_objective, optimizer)
    state, losses = init_state(jax.tree.map(jnp.copy, PARAMS), optimizer), []
    for _ in range(30):
        state, metrics = step(state, cut(24), None)
        losses.append(float(metrics["loss"].mean()))
    assert losses[0] == pytest.approx(np.log(MODEL.vocab_size), abs=1.0)  # near uniform at first
    assert losses[-1] < 0.4
    assert int(state.num_updates) == 30
