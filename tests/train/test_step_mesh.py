"""The same step on any mesh: loss, gradient, metrics and updated parameters equal those of a single device."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.policy.config import MeshConfig, ModelConfig, PolicyConfig
from magistral_jax.policy.sharding import check_mesh, make_mesh, param_shardings, shard_batch
from magistral_jax.policy.transformer import init_params
from magistral_jax.records import MagistralError
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.config import LossConfig, OptimizerConfig
from magistral_jax.train.footprint import abstract_batch, abstract_state, bytes_of
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import grpo_objective, init_sharded, init_state, make_train_step, sft_objective

MODEL = ModelConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=32)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.01, eps=1e-3, weight_decay=0.1), 10)
# An "optimizer" that keeps the gradient as its state: what a step computes, exactly.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)
# Float32 sums in another order: gradients are of size 0.01 … 1.
close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=3e-6)


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def params_of(model: ModelConfig = MODEL):
    return jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))


@functools.cache
def batch():
    """8 rows of 16 tokens in 2 microbatches, the second one only partly filled; sequences cross every cut of a row."""
    rng = np.random.default_rng(0)
    lengths = [(2, 12), (3, 9), (1, 3), (5, 11), (2, 2), (4, 7), (1, 14), (6, 9), (2, 8), (3, 3), (2, 4)]
    sequences = [
        TrainingSequence(
            prompt_ids=rng.integers(0, MODEL.vocab_size, prompt).astype(np.int32),
            completion_ids=rng.integers(0, MODEL.vocab_size, completion).astype(np.int32),
            behavior_logprob=(-np.log(MODEL.vocab_size) + rng.uniform(-1, 1, completion)).astype(np.float32),
            advantage=float(rng.normal()),
            staleness=rng.integers(0, 2, completion).astype(np.int32),
        )
        for prompt, completion in lengths
    ]
    return collate(sequences, row_tokens=16, rows_per_microbatch=8)


def step_on(
    config: MeshConfig | None, model: ModelConfig = MODEL, policy: PolicyConfig | None = None, optimizer=RECORDER
):
    """(state, metrics) of one step of GRPO with an entropy bonus."""
    policy = policy or PolicyConfig(logprob_chunk=16)
    objective = grpo_objective(LossConfig(entropy_coef=0.01))
    if config is None:
        state = init_state(jax.tree.map(jnp.copy, params_of(model)), RECORDER)
        return make_train_step(model, policy, objective, RECORDER)(state, batch(), None)
    mesh = make_mesh(config)
    state = init_sharded(place(params_of(model), mesh, model), model, mesh, RECORDER)
    return make_train_step(model, policy, objective, RECORDER, mesh=mesh)(state, shard_batch(batch(), mesh), None)


def place(params: Any, mesh: Mesh, model: ModelConfig = MODEL):
    return jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s), params, param_shardings(model, mesh, params))


@functools.cache
def alone():
    return jax.device_get(step_on(None))


MESHES = [
    MeshConfig(fsdp=8),
    MeshConfig(sequence=4),  # more than there are key-value heads
    MeshConfig(tensor=4),  # likewise
    MeshConfig(data=2, fsdp=4),
    MeshConfig(fsdp=2, sequence=2, tensor=2),
]


@pytest.mark.parametrize("config", MESHES, ids=lambda c: f"{c.data}x{c.fsdp}x{c.sequence}x{c.tensor}")
def test_loss_gradient_and_metrics_equal_those_of_one_device(config: MeshConfig):
    state, metrics = step_on(config)
    expected, expected_metrics = alone()
    jax.tree.map(close, state.opt_state, expected.opt_state)
    jax.tree.map(functools.partial(close, atol=1e-4), metrics, expected_metrics)


def test_tied_embeddings_and_bfloat16_on_a_mesh():
    model = dataclasses.replace(MODEL, tie_embeddings=True, qkv_bias=True)
    policy = PolicyConfig(logprob_chunk=16, dtype="bfloat16", remat="outputs")
    (state, metrics), (expected, expected_metrics) = (
        step_on(config, model, policy) for config in (MeshConfig(fsdp=2, sequence=2, tensor=2), None)
    )
    assert float(metrics["loss"].mean()) == pytest.approx(float(expected_metrics["loss"].mean()), abs=0.01)
    gap = jax.tree.map(lambda a, b: float(optax.tree.norm(np.asarray(a) - b)), state.opt_state, expected.opt_state)
    assert optax.tree.norm(gap) < 0.05 * optax.tree.norm(expected.opt_state)


def test_updates_on_a_mesh_are_those_of_one_device_without_a_retrace_and_nothing_is_copied():
    config = MeshConfig(data=2, fsdp=2, sequence=2)
    mesh, objective = make_mesh(config), grpo_objective(LossConfig())
    policy = PolicyConfig(logprob_chunk=16)
    state = init_state(jax.tree.map(jnp.copy, params_of()), OPTIMIZER)
    step = make_train_step(MODEL, policy, objective, OPTIMIZER)
    for _ in range(3):
        state, _ = step(state, batch(), None)

    spread = init_sharded(place(params_of(), mesh), MODEL, mesh, OPTIMIZER)
    shardings = jax.tree.map(lambda x: x.sharding, spread)
    step = make_train_step(MODEL, policy, objective, OPTIMIZER, mesh=mesh)
    spread, _ = step(spread, shard_batch(batch(), mesh), None)
    with jax.no_tracing():
        for _ in range(2):
            spread, _ = step(spread, shard_batch(batch(), mesh), None)
    assert jax.tree.map(lambda x: x.sharding, spread) == shardings
    jax.tree.map(functools.partial(close, atol=2e-4), spread.params, state.params)
    # `fsdp` and `sequence` cut every matrix and its moments in four; only norms are everywhere whole.
    size = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    norms = sum(x.nbytes for x in jax.tree.leaves(spread) if x.ndim <= 2 and x.shape[-1:] == (16,) and x.shape[0] <= 2)
    total = sum(x.nbytes for x in jax.tree.leaves(spread))
    assert size(spread) < total / 4 + norms + 100


def test_a_run_on_eight_devices_goes_on_on_two(tmp_path: pathlib.Path):
    eight, two = (make_mesh(MeshConfig(data=2, fsdp=2, sequence=2)), make_mesh(MeshConfig(fsdp=2)))
    policy, objective = PolicyConfig(logprob_chunk=16), grpo_objective(LossConfig())
    fresh = lambda mesh: init_sharded(place(params_of(), mesh), MODEL, mesh, OPTIMIZER)
    step = make_train_step(MODEL, policy, objective, OPTIMIZER, mesh=eight)
    state, _ = step(fresh(eight), shard_batch(batch(), eight), None)
    like = fresh(two)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        restored = checkpoints.restore(like).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
    kernel = restored.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.devices() == set(two.devices.flat)
    assert kernel.addressable_shards[0].data.size == kernel.size / 2
    # Moments, counters and all: what comes next is what eight devices would have done.
    fewer = make_train_step(MODEL, policy, objective, OPTIMIZER, mesh=two)
    (on_eight, expected), (on_two, found) = (
        step(state, shard_batch(batch(), eight), None),
        fewer(restored, shard_batch(batch(), two), None),
    )
    jax.tree.map(functools.partial(close, atol=1e-4), found, expected)
    jax.tree.map(functools.partial(close, atol=2e-4), on_two.params, on_eight.params)


@pytest.mark.parametrize("policy", ["dots_no_batch", "outputs"])
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(policy: Any):
    state, _ = step_on(None, policy=PolicyConfig(logprob_chunk=16, remat=policy))
    jax.tree.map(close, state.opt_state, alone()[0].opt_state)


def test_what_is_kept_shrinks_from_policy_to_policy():
    """Memory that the compiler plans for a step with long rows, eight layers, all tokens used."""
    model = dataclasses.replace(MODEL, num_layers=8, d_ff=128)
    mesh = make_mesh(MeshConfig())
    state = abstract_state(model, mesh, RECORDER, jnp.dtype("float32"))
    temp = {}
    for remat in ("none", "outputs", "full"):
        step = make_train_step(model, PolicyConfig(remat=remat), grpo_objective(LossConfig()), RECORDER)
        lowered = jax.jit(step).lower(state, abstract_batch(mesh, rows=1, row_tokens=1024))
        planned: Any = lowered.compile().memory_analysis()
        temp[remat] = planned.temp_size_in_bytes
    assert temp["none"] > temp["outputs"] > temp["full"]


def bytes_on(config: MeshConfig):
    """What of a state every device holds whole, and what the compiler plans for a device and a step."""
    model, mesh = dataclasses.replace(MODEL, d_model=64, vocab_size=512, d_ff=128, num_kv_heads=4), make_mesh(config)
    step = make_train_step(model, PolicyConfig(logprob_chunk=64), sft_objective, OPTIMIZER, mesh=mesh)
    state = abstract_state(model, mesh, OPTIMIZER, jnp.dtype("float32"))
    batch = abstract_batch(mesh, rows=8, row_tokens=128)
    planned: Any = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    assert planned.argument_size_in_bytes == bytes_of(state) + bytes_of(batch)  # a device gets its part and no more
    return [leaf for leaf in jax.tree.leaves(state) if leaf.sharding.is_fully_replicated], planned


def test_nothing_is_on_every_device_that_need_not_be():
    _, alone = bytes_on(MeshConfig())
    for config in (MeshConfig(fsdp=8), MeshConfig(fsdp=2, sequence=2, tensor=2)):
        whole, found = bytes_on(config)
        assert max(leaf.size for leaf in whole) == 2 * 64  # the norms of two layers
        assert found.argument_size_in_bytes < 1.05 * alone.argument_size_in_bytes / 8
        # Activations, and the weights that are gathered for the layer at work.
        assert found.temp_size_in_bytes < 1.25 * alone.temp_size_in_bytes / 8


def test_a_mesh_that_cannot_be_is_refused():
    with pytest.raises(MagistralError, match=r"= 16 devices .* there are 8"):
        make_mesh(MeshConfig(data=4, tensor=4))
    with pytest.raises(MagistralError, match=r"\(8\) must divide the model's 4 attention heads"):
        check_mesh(MODEL, make_mesh(MeshConfig(sequence=4, tensor=2)))
