"""Loading onto a mesh: the values of `load_params`, and never more than a device's part of a parameter read at once."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from magistral_jax.policy import hf_stream
from magistral_jax.policy.config import MeshConfig, ModelConfig
from magistral_jax.policy.hf_folder import TensorFiles, load_params, save_folder, tensor_table
from magistral_jax.policy.hf_stream import load_sharded
from magistral_jax.policy.sharding import make_mesh, param_shardings
from magistral_jax.policy.transformer import init_params
from magistral_jax.records import MagistralError

# Mistral Small's proportions: heads together are narrower than the model.
MODEL = ModelConfig(vocab_size=16, d_model=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=32)
FAMILIES = {
    "mistral": MODEL,
    "qwen2": dataclasses.replace(MODEL, qkv_bias=True),
    "qwen3": dataclasses.replace(MODEL, qk_norm=True, tie_embeddings=True),
}


def save(folder: pathlib.Path, family: Any = "mistral", **kwargs: Any):
    rng, params = np.random.default_rng(0), {}
    for entry in tensor_table(FAMILIES[family]):
        tree = params
        for key in entry.path[:-1]:
            tree = tree.setdefault(key, {})
        shape = (MODEL.num_layers, *entry.shape) if entry.is_stacked else entry.shape
        tree[entry.path[-1]] = rng.normal(size=shape).astype(np.float32)
    save_folder(folder, params, FAMILIES[family], model_type=family, **kwargs)
    return FAMILIES[family]


def shardings_for(config: ModelConfig, mesh: MeshConfig):
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return param_shardings(config, make_mesh(mesh), shapes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(), MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(sequence=4, tensor=2)],
    ids=lambda c: f"{c.data}x{c.fsdp}x{c.sequence}x{c.tensor}",
)
def test_values_are_those_of_the_folder_wherever_they_lie(tmp_path: pathlib.Path, family: str, mesh: MeshConfig):
    config = save(tmp_path / "m", family, max_shard_bytes=3000)  # several files
    shardings = shardings_for(config, mesh)
    loaded = load_sharded(tmp_path / "m", config, shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, load_params(tmp_path / "m", config))
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_is_read_in_parts_and_converted(tmp_path: pathlib.Path, stored: str):
    config = save(tmp_path / "m", dtype=stored)
    shardings = shardings_for(config, MeshConfig(fsdp=4, tensor=2))
    for dtype in (np.float32, ml_dtypes.bfloat16):
        loaded = load_sharded(tmp_path / "m", config, shardings, dtype)
        jax.tree.map(np.testing.assert_array_equal, loaded, load_params(tmp_path / "m", config, dtype))
        assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}


def test_each_byte_is_read_once_and_at_most_a_device_part_at_a_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    config = save(tmp_path / "m")
    shardings = shardings_for(config, MeshConfig(data=2, fsdp=2, tensor=2))
    parts, reads = [], []
    read_part, read = hf_stream._read_part, TensorFiles.read  # pyright: ignore[reportPrivateUsage]

    def spy_part(*args):
        parts.append(read_part(*args))
        return parts[-1]

    def spy_read(self, *args):
        tensor = read(self, *args)
        reads.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(hf_stream, "_read_part", spy_part)
    monkeypatch.setattr(TensorFiles, "read", spy_read)
    loaded = load_sharded(tmp_path / "m", config, shardings)
    largest_part = max(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(loaded))
    largest = max(x.nbytes for x in jax.tree.leaves(loaded))
    assert max(p.nbytes for p in parts) == largest_part == largest // 4
    assert max(reads) <= largest_part
    # The copy over `data` reads nothing again; norms, which nothing cuts, are read once and not once a device.
    assert sum(reads) == sum(4 * math.prod(x.shape) for x in jax.tree.leaves(loaded))


def test_a_folder_of_another_model_is_refused_before_anything_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    config = save(tmp_path / "m")
    deeper = dataclasses.replace(config, num_layers=4)
    monkeypatch.setattr(TensorFiles, "read", lambda *args: pytest.fail("read"))
    with pytest.raises(MagistralError, match=r"tensor model\.layers\.3\.\S+ is missing"):
        load_sharded(tmp_path / "m", deeper, shardings_for(deeper, MeshConfig()))
