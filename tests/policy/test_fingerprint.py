"""Fingerprints: equal for equal weights wherever they lie, different for every mistake that swaps or spoils some."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from magistral_jax.policy.fingerprint import fingerprint


def make_tree(seed: int = 0, dtype: Any = np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    return {"embed": draw(7, 4), "layers": {"k": draw(2, 4, 4), "q": draw(2, 4, 4), "scale": draw(2, 4)}}


def loop_fingerprint(tree: Any):
    """The same sum in plain Python integers."""
    total = 2166136261
    for leaf in jax.tree.leaves(tree):
        words = np.asarray(leaf).reshape(-1).view({4: np.uint32, 2: np.uint16}[leaf.dtype.itemsize])
        leaf_sum = 0
        for place, word in enumerate(words.tolist()):
            x = (word + place * 0x9E3779B9) % 2**32
            x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
            x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
            leaf_sum += x ^ (x >> 16)
        total = (total * 16777619 + leaf_sum) % 2**32
    return total


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_loop(dtype: Any):
    assert fingerprint(make_tree(dtype=dtype)) == loop_fingerprint(make_tree(dtype=dtype))


def test_equal_weights_agree():
    assert fingerprint(make_tree()) == fingerprint(make_tree())
    assert 0 <= fingerprint(make_tree()) < 2**32


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, "data")])
def test_sharding_does_not_matter(spec: PartitionSpec):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), make_tree())
    assert fingerprint(placed) == fingerprint(make_tree())


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec("data", "tensor"), PartitionSpec(None, "data")])
def test_what_is_split_is_summed_up_where_it_lies(spec: PartitionSpec):
    """Over one axis or two, with copies, and a scalar beside it."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    tree = make_tree()["layers"] | {"count": jnp.float32(3.0)}
    place = lambda leaf: NamedSharding(mesh, spec if leaf.ndim > 1 else PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), tree)
    assert fingerprint(placed) == loop_fingerprint(tree) == fingerprint(tree)
    placed["k"] = placed["k"].at[1, 3, 2].multiply(2.0)
    assert fingerprint(placed) != fingerprint(tree)


@settings(max_examples=30, deadline=None)
@given(where=st.integers(0, 31), bit=st.integers(0, 31))
def test_one_flipped_bit_shows(where: int, bit: int):
    tree = make_tree()
    words = np.array(tree["layers"]["q"]).view(np.uint32)
    words.reshape(-1)[where] ^= np.uint32(1 << bit)
    tree["layers"]["q"] = jnp.asarray(words.view(np.float32))
    assert fingerprint(tree) != fingerprint(make_tree())


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 31), second=st.integers(0, 31))
def test_two_swapped_elements_show(first: int, second: int):
    tree = make_tree()
    flat = np.array(tree["layers"]["q"]).reshape(-1)
    flat[[first, second]] = flat[[second, first]]
    tree["layers"]["q"] = jnp.asarray(flat.reshape(2, 4, 4))
    assert (fingerprint(tree) == fingerprint(make_tree())) == (first == second)


def test_swapped_layers_show():
    tree = make_tree()
    swapped = tree | {"layers": jax.tree.map(lambda leaf: leaf[::-1], tree["layers"])}
    assert fingerprint(swapped) != fingerprint(tree)
    split = [jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(2)]
    assert fingerprint(tuple(split)) != fingerprint(tuple(split[::-1]))


def test_swapped_layers_of_constants_show_at_sizes_that_are_powers_of_two():
    # 2¹⁶ words apart: in a sum of word · (2 · place + 1) the swap moves 2¹⁶ equal differences by 2¹⁷ each, 0 mod 2³².
    layers = jnp.stack([jnp.zeros((256, 256)), jnp.ones((256, 256))])
    assert fingerprint(layers) != fingerprint(layers[::-1])


def test_swapped_leaves_show():
    tree = make_tree()
    layers = tree["layers"]
    swapped = tree | {"layers": layers | {"q": layers["k"], "k": layers["q"]}}
    assert fingerprint(swapped) != fingerprint(tree)


def test_signs_and_tiny_changes_show():
    tree = make_tree()
    negated = tree | {"embed": -tree["embed"]}
    nudged = tree | {"embed": tree["embed"].at[3, 1].multiply(1 + 2e-7)}
    assert len({fingerprint(t) for t in (tree, negated, nudged)}) == 3


def test_many_trees_have_many_fingerprints():
    assert len({fingerprint(make_tree(seed)) for seed in range(50)}) == 50
