"""Publishing inside one process: what the generator holds survives the trainer's next update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.policy.transformer import forward, init_params, unstack
from magistral_jax.publish.same_process import make_publish
from magistral_jax.train.collate import TrainingSequence, collate
from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import init_state, make_train_step, sft_objective

MODEL = ModelConfig(vocab_size=13, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=8)


def make_params(seed: int = 0, model: ModelConfig = MODEL):
    return jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed))


def host(tree: Any):
    return jax.tree.map(np.array, tree)  # a copy, not a view of the device's memory


def make_mesh(devices: slice, *shape: int):
    names = ("a", "b")[: len(shape)]
    return Mesh(np.array(jax.devices()[devices]).reshape(shape), names, axis_types=(AxisType.Auto,) * len(shape))


def lay_out(tree: Any, mesh: Mesh, *, last: bool):
    """Shardings that cut the last, or the first, axis that the mesh's first axis divides."""

    def cut(leaf: jax.Array) -> NamedSharding:
        axes = [i for i in range(leaf.ndim) if leaf.shape[i] % mesh.shape["a"] == 0]
        spec: list[str | None] = [None] * leaf.ndim
        if axes:
            spec[axes[-1 if last else 0]] = "a"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(cut, tree)


@pytest.fixture
def host_gathers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the arrays that were gathered in host memory."""
    gathered = []
    kind = type(jnp.zeros(1))
    original = vars(kind)["_value"].fget
    monkeypatch.setattr(kind, "_value", property(lambda array: (gathered.append(array.shape), original(array))[1]))
    return gathered


def make_batch():
    ids = np.arange(4, dtype=np.int32)
    zeros = np.zeros(4, np.float32)
    return collate([TrainingSequence(ids, ids, zeros, 1.0, ids)], row_tokens=8, rows_per_microbatch=1)


def test_published_weights_survive_an_update_that_donates_the_trainers():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), 2)
    step = make_train_step(MODEL, PolicyConfig(), sft_objective, optimizer)
    publish = make_publish(MODEL, jnp.dtype("float32"))
    state = init_state(make_params(), optimizer)
    published = publish(state.params)
    before = host(published)
    donated = state.params
    state, _ = step(state, make_batch(), None)
    assert donated["embed"]["embedding"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, host(published), before)
    # The trainer has moved on, so the test would notice if both looked at the same memory.
    assert fingerprint(publish(state.params)) != fingerprint(published)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_no_leaf_is_handed_on_unchanged(num_layers: int):
    # With one layer, unstacking is a reshape, and the other leaves are not computed on at all.
    model = dataclasses.replace(MODEL, num_layers=num_layers)
    params = make_params(model=model)
    published = make_publish(model, jnp.dtype("float32"))(params)
    before = host(published)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    overwrite(params)
    jax.tree.map(np.testing.assert_array_equal, host(published), before)


def test_published_arrays_share_no_memory_with_the_trainers():
    params = make_params()
    published = make_publish(MODEL, jnp.dtype("float32"))(params)
    pointers = lambda tree: {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}
    assert not pointers(params) & pointers(published)


def test_values_and_layers_arrive_in_order():
    params = make_params()
    published = make_publish(MODEL, jnp.dtype("float32"))(params)
    assert isinstance(published["layers"], tuple)
    for i, layer in enumerate(published["layers"]):
        stacked = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        jax.tree.map(np.testing.assert_array_equal, layer, stacked)
    jax.tree.map(np.testing.assert_array_equal, published["embed"], params["embed"])
    jax.tree.map(np.testing.assert_array_equal, published["head"], params["head"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cast_to_the_generators_precision(dtype: str):
    params = make_params()
    published = make_publish(MODEL, jnp.dtype(dtype))(params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(published)} == {dtype}
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), unstack(params, MODEL))
    jax.tree.map(np.testing.assert_array_equal, published, expected)
    assert str(params["embed"]["embedding"].dtype) == "float32"  # the trainer's own stay as they are


def test_from_a_sharded_trainer_whole_weights_land_on_the_generators_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = make_params()
    expected = host(unstack(params, MODEL))  # before the donation below, which takes device 0's share of `params` along
    last_axis = lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1), "data" if leaf.shape[-1] % 8 == 0 else None)
    sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, last_axis(leaf))), params)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    published = make_publish(MODEL, jnp.dtype("float32"), mesh)(sharded)
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(published)} == {mesh.devices.flat[0]}
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(published))
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(sharded)
    jax.tree.map(np.testing.assert_array_equal, published, expected)


def test_receipt_is_equal_on_both_sides_and_differs_after_an_update():
    publish = make_publish(MODEL, jnp.dtype("bfloat16"))
    sent = publish(make_params())
    held = jax.device_put(host(sent), jax.devices()[1])  # as another holder has them
    assert fingerprint(held) == fingerprint(sent)
    assert fingerprint(publish(make_params(1))) != fingerprint(sent)


def test_the_second_publish_does_not_trace_again():
    publish = make_publish(MODEL, jnp.dtype("float32"))
    first, second = make_params(0), make_params(1)
    publish(first)
    with jax.no_tracing():
        publish(second)


def test_the_generator_computes_what_the_trainer_computes():
    params = make_params()
    published = make_publish(MODEL, jnp.dtype("float32"))(params)
    tokens = jnp.asarray([[1, 2, 3, 4]])
    run = lambda layers: forward(
        params | {"layers": layers}, MODEL, tokens, jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32)
    )[0]
    restacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *published["layers"])
    np.testing.assert_array_equal(run(restacked), run(params["layers"]))


BIG = dataclasses.replace(MODEL, vocab_size=16, num_kv_heads=2)
DEVICES = {"same": ((0, 4), (4, 8)), "fsdp-tp": ((0, 4), (4, 8)), "fsdp4-tp2": ((0, 4), (4, 6))}
DEVICES |= {"fsdp2-tp4": ((0, 2), (4, 8)), "fsdp2-tp3": ((0, 2), (2, 5)), "colocated": ((0, 4), (0, 2))}


@pytest.mark.parametrize("case", DEVICES)
def test_from_mesh_to_mesh_nothing_passes_through_the_host(case: str, host_gathers: list[tuple[int, ...]]):
    trainer, generator = (make_mesh(slice(*ends), ends[1] - ends[0]) for ends in DEVICES[case])
    params = make_params(model=BIG)
    expected = host(unstack(params, BIG))
    sharded = jax.tree.map(jax.device_put, params, lay_out(params, trainer, last=True))
    shardings = lay_out(unstack(params, BIG), generator, last=case == "same")
    publish = make_publish(BIG, jnp.dtype("float32"), trainer, generator, shardings)
    host_gathers.clear()
    published = jax.block_until_ready(publish(sharded))
    assert host_gathers == []
    for leaf, sharding in zip(jax.tree.leaves(published), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    with jax.no_tracing():
        jax.block_until_ready(publish(sharded))
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(sharded)
    jax.tree.map(np.testing.assert_array_equal, published, expected)


def test_one_step_between_two_layouts_would_pass_through_the_host(host_gathers: list[tuple[int, ...]]):
    """The trap that the three stages avoid, and that the spy sees it."""
    trainer, generator = make_mesh(slice(0, 4), 4), make_mesh(slice(4, 8), 4)
    source = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(trainer, PartitionSpec(None, "a")))
    host_gathers.clear()
    jax.block_until_ready(jax.device_put(source, NamedSharding(generator, PartitionSpec("a"))))
    assert host_gathers == [(8, 16)]


def test_whole_weights_on_every_generator_device(host_gathers: list[tuple[int, ...]]):
    trainer, generator = make_mesh(slice(0, 4), 4), make_mesh(slice(4, 8), 4)
    params = make_params(model=BIG)
    expected = host(unstack(params, BIG))
    sharded = jax.tree.map(jax.device_put, params, lay_out(params, trainer, last=True))
    whole = jax.tree.map(lambda leaf: NamedSharding(generator, PartitionSpec()), unstack(params, BIG))
    host_gathers.clear()
    publish = make_publish(BIG, jnp.dtype("bfloat16"), trainer, generator, whole)
    published = jax.block_until_ready(publish(sharded))
    assert host_gathers == []
    assert all(leaf.is_fully_replicated and len(leaf.devices()) == 4 for leaf in jax.tree.leaves(published))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), published, expected)
