"""Bytes and collectives of a step from shapes alone."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from magistral_jax.policy.config import MeshConfig, ModelConfig, PolicyConfig
from magistral_jax.policy.sharding import make_mesh
from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.footprint import Collective, abstract_base, abstract_state, collectives, step_bytes
from magistral_jax.train.optimizer import make_optimizer

MODEL = ModelConfig(vocab_size=64, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64)
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
PLAIN = PolicyConfig()
# Matrices: 2 embeddings, and q, o of 32·32, k, v of 32·16, three of 32·64 a layer; norms: two a layer and a last one.
MATRICES = 2 * 64 * 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
NORMS = 7 * 32


def bytes_on(mesh: MeshConfig, policy: PolicyConfig = PLAIN, param_dtype: str = "float32", rows: int = 8):
    devices = make_mesh(mesh)
    state = abstract_state(MODEL, devices, OPTIMIZER, jnp.dtype(param_dtype))
    return step_bytes(MODEL, policy, state, devices, rows=rows, row_tokens=32)


def test_parameters_gradients_and_moments_are_cut_over_the_mesh_but_for_norms():
    for mesh, parts in ((MeshConfig(), 1), (MeshConfig(fsdp=8), 8), (MeshConfig(data=2, sequence=2, tensor=2), 4)):
        found = bytes_on(mesh)
        one = 4 * (MATRICES // parts + NORMS)
        assert found["parameters"] == found["gradients"] == one
        assert 2 * one <= found["optimizer"] <= 2 * one + 16  # and its counters
    assert bytes_on(MeshConfig(fsdp=8), param_dtype="bfloat16")["parameters"] == 2 * (MATRICES // 8 + NORMS)


def test_activations_are_what_each_layer_keeps_of_the_tokens_of_a_device():
    used = lambda mesh, **settings: bytes_on(mesh, PolicyConfig(**settings), rows=24)["activations"]
    full, none = used(MeshConfig(), remat="full"), used(MeshConfig())
    working = full - 3 * 24 * 32 * 32 * 4  # the input of each layer: rows · tokens · width · 4 bytes
    assert 0 < working < none / 2
    # Rows or stretches of rows: a device has an eighth of the tokens either way.
    for mesh in (MeshConfig(fsdp=8), MeshConfig(fsdp=2, sequence=4)):
        assert used(mesh, remat="full") == pytest.approx(full / 8, rel=0.05)
    assert full < used(MeshConfig(), remat="dots") < none
    assert used(MeshConfig(), dtype="bfloat16") < none


def test_an_activation_of_the_shape_of_a_weight_is_counted():
    # 32 or 64 tokens are as many as a matrix has rows; 33 and 65 are not.
    state = abstract_state(MODEL, make_mesh(MeshConfig()), OPTIMIZER, jnp.dtype("float32"))
    for policy in (PLAIN, PolicyConfig(lora_rank=2)):
        used = lambda n, p=policy: step_bytes(MODEL, p, state, make_mesh(MeshConfig()), rows=1, row_tokens=n)
        for tokens in (32, 64):
            even, odd = (used(n)["activations"] for n in (tokens, tokens + 1))
            assert even == pytest.approx(odd * tokens / (tokens + 1), rel=0.005)


def test_adapters_are_all_that_has_gradients_and_moments():
    policy, mesh = PolicyConfig(lora_rank=2, lora_targets="mlp", dtype="bfloat16"), make_mesh(MeshConfig(fsdp=8))
    state = abstract_state(MODEL, mesh, OPTIMIZER, jnp.dtype("float32"), policy)
    base = abstract_base(MODEL, mesh, policy)
    found = step_bytes(MODEL, policy, state, mesh, rows=8, row_tokens=32, base=base)
    num = 3 * 3 * 2 * (32 + 64)  # three layers, three matrices of 32 · 64 in each, rank 2
    assert found["parameters"] == 2 * (MATRICES // 8 + NORMS)
    assert found["adapters"] == found["gradients"] == 4 * num  # whole on each device
    assert 8 * num <= found["optimizer"] <= 8 * num + 16
    assert abstract_base(MODEL, mesh, PLAIN) is None


def test_logits_are_those_of_a_chunk_whatever_the_tokens():
    chunk = PolicyConfig(logprob_chunk=16)
    assert bytes_on(MeshConfig(), chunk)["logits chunk"] == 3 * 16 * 64 * 4
    assert bytes_on(MeshConfig(tensor=2), chunk, rows=64)["logits chunk"] == 3 * 16 * 32 * 4


PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%layer (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8,4]{1,0} all-gather(%w), channel_id=1, dimensions={0}
  %t = (f32[2]{0}, f32[2]{0}, /*index=2*/f32[2]{0}) all-to-all(%p, %q, %r), channel_id=2
  ROOT %s = f32[4]{0} reduce-scatter(%y), to_apply=%add
}

%microbatch (x: f32[8]) -> f32[8] {
  ROOT %w = (s32[], f32[8]) while(%x), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"40"}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %v = f32[8]{0} while(%x), condition=%d, body=%microbatch
  ROOT %n = f32[] all-reduce(%v), to_apply=%add
}
"""


def test_collectives_in_a_loop_over_layers_count_once_a_layer():
    expected = {
        "all-gather": Collective(40, 40 * 32 * 4),
        "all-reduce": Collective(1, 4),
        "all-to-all": Collective(40, 40 * 6 * 4),
        "reduce-scatter": Collective(40, 40 * 4 * 4),
    }
    assert collectives(PROGRAM, dtype="float32") == expected
    # A CPU computes bfloat16 in float32; the sum of the gradients is float32 everywhere.
    halved = {
        kind: found if kind == "reduce-scatter" else dataclasses.replace(found, num_bytes=found.num_bytes // 2)
        for kind, found in expected.items()
    }
    assert collectives(PROGRAM, dtype="bfloat16") == halved


def test_nothing_is_allocated():
    state = abstract_state(MODEL, make_mesh(MeshConfig(fsdp=8)), OPTIMIZER, jnp.dtype("float32"))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
