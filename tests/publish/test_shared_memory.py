"""Weights in shared memory: exact, never written while somebody reads, checked by the reader, gone at the end."""

import concurrent.futures
import dataclasses
import os
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import init_params, unstack
from magistral_jax.publish.manifest import Manifest, WeightsRefusedError
from magistral_jax.publish.plane import Delivery, Published, wanted_params
from magistral_jax.publish.shared_memory import SharedMemoryReader, SharedWeights
from magistral_jax.records import MagistralError

MODEL = ModelConfig(vocab_size=13, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=8)


def make_params(seed: int, dtype: str = "float32", model: ModelConfig = MODEL) -> Any:
    """In the generator's layout, as a publish gives them."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: unstack(init_params(model, jax.random.key(0)), model))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.dtype(dtype)), shapes)


def mapped_segments() -> int:
    return pathlib.Path("/proc/self/maps").read_text().count("memfd:magistral-weights")


@pytest.fixture
def weights() -> Iterator[SharedWeights]:
    shared = SharedWeights()
    yield shared
    shared.close()
    assert mapped_segments() == 0


def make_reader(dtype: str = "float32") -> SharedMemoryReader:
    return SharedMemoryReader(wanted_params(MODEL, jnp.dtype(dtype)))


def nothing(buffer: memoryview) -> None:
    raise AssertionError("there is no payload")


def read(reader: SharedMemoryReader, published: Published, descriptor: int | None = None) -> Any:
    """As a generator does, with a descriptor of its own."""
    descriptor = descriptor or os.dup(published.content.descriptor)
    return reader.receive(Delivery(published.manifest, {}, descriptor, 0, nothing, "the trainer"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_was_written(weights: SharedWeights, dtype: str):
    params = make_params(0, dtype)
    weights.write(params, 5)
    published = weights.hold()
    assert published.manifest.version == 5
    found = read(make_reader(dtype), published)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {dtype}


def test_what_was_read_outlives_the_memory_that_it_came_from(weights: SharedWeights):
    weights.write(make_params(0), 0)
    published = weights.hold()
    found = read(make_reader(), published)
    published.content.memory[:] = 255  # as the next version would
    jax.tree.map(np.testing.assert_array_equal, found, make_params(0))


def test_a_version_stays_as_it_is_until_it_is_released(weights: SharedWeights):
    reader = make_reader()
    weights.write(make_params(0), 0)
    first = weights.hold()
    for version in range(1, 5):
        weights.write(make_params(version), version)
    jax.tree.map(np.testing.assert_array_equal, read(reader, first), make_params(0))
    assert weights.hold().manifest.version == 4
    assert weights.num_segments == 3  # the held one, and two in turn


def test_without_slow_readers_two_segments_do(weights: SharedWeights):
    for version in range(6):
        weights.write(make_params(version), version)
        published = weights.hold()
        weights.release(published, was_taken=True)
    assert weights.num_segments == 2


def test_readers_and_a_writer_at_one_time(weights: SharedWeights):
    """Each reader, however it falls in with the writer, sees one whole version."""
    reader, num_versions = make_reader(), 60
    params = [make_params(version) for version in range(num_versions)]
    weights.write(params[0], 0)
    is_over = threading.Event()

    def follow() -> int:
        newest = 0
        while not is_over.is_set():
            published = weights.hold()
            version = published.manifest.version
            assert version >= newest
            newest = version
            found = read(reader, published)
            weights.release(published, was_taken=True)
            jax.tree.map(np.testing.assert_array_equal, found, params[version])
        return newest

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(follow) for _ in range(2)]
        for version in range(1, num_versions):
            weights.write(params[version], version)
        is_over.set()
        assert all(future.result() < num_versions for future in readers)
    assert weights.num_segments <= 4


def test_other_bytes_are_refused_by_the_name_of_the_leaf(weights: SharedWeights):
    weights.write(make_params(0), 3)
    published = weights.hold()
    leaf = published.manifest.leaves[4]
    published.content.memory[leaf.offset + leaf.num_bytes - 1] ^= 1
    sentence = f"weights of version 3: the bytes of leaf {leaf.path} have checksum 0x"
    with pytest.raises(WeightsRefusedError, match=re.escape(sentence)):
        read(make_reader(), published)


def test_weights_of_another_model_are_refused_and_nothing_stays_open(weights: SharedWeights):
    weights.write(make_params(0, model=dataclasses.replace(MODEL, d_ff=16)), 3)
    published = weights.hold()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightsRefusedError, match=r"leaf \['layers'\]\[0\].* is float32\[.*16.*\], expected float32\["):
        read(make_reader(), published)
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_that_is_too_short_is_refused(weights: SharedWeights):
    weights.write(make_params(0), 0)
    descriptor = os.memfd_create("short")
    os.truncate(descriptor, 10)
    with pytest.raises(WeightsRefusedError, match=r"10 bytes came, expected \d+"):
        read(make_reader(), weights.hold(), descriptor)


def test_a_write_that_fails_leaves_the_version_before(weights: SharedWeights):
    weights.write(make_params(0), 0)
    gone = make_params(1)
    jax.tree.leaves(gone)[-1].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        weights.write(gone, 1)
    published = weights.hold()
    assert published.manifest.version == 0
    found = read(make_reader(), published)
    jax.tree.map(np.testing.assert_array_equal, found, make_params(0))


def test_too_little_memory_is_one_sentence(weights: SharedWeights, monkeypatch: pytest.MonkeyPatch):
    def refuse(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MagistralError, match=r"^No shared memory for 0\.00 GB of weights: No space left on device"):
        weights.write(make_params(0), 0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_system_without_such_memory_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(MagistralError, match="need Linux"):
        SharedWeights()


def test_holding_comes_after_writing(weights: SharedWeights):
    with pytest.raises(ValueError, match="no weights yet"):
        weights.hold()


def test_closing_frees_memory_and_descriptors():
    before = len(os.listdir("/proc/self/fd"))
    weights = SharedWeights()
    for version in range(3):
        weights.write(make_params(version), version)
    assert mapped_segments() == 2
    weights.close()
    assert mapped_segments() == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_parameters_without_leaves_pass(weights: SharedWeights):
    weights.write({}, 0)
    assert weights.hold().manifest == Manifest(0, ())
