"""The manifest: places that do not overlap, a round trip through JSON, and a sentence for each kind of difference."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from magistral_jax.publish.manifest import Leaf, Manifest, WeightsRefusedError, check_layout, lay_out

SHAPES = {
    "embed": jax.ShapeDtypeStruct((5, 3), jnp.float32),
    "layers": ({"w": jax.ShapeDtypeStruct((7,), jnp.bfloat16)}, {"w": jax.ShapeDtypeStruct((), jnp.float32)}),
}


def test_leaves_lie_one_after_the_other_and_aligned():
    assert lay_out(SHAPES) == (
        Leaf("['embed']", (5, 3), "float32", 0),  # 60 bytes
        Leaf("['layers'][0]['w']", (7,), "bfloat16", 64),  # 14 bytes
        Leaf("['layers'][1]['w']", (), "float32", 128),
    )
    assert Manifest(0, lay_out(SHAPES)).num_bytes == 132
    assert Manifest(0, ()).num_bytes == 0


def test_arrays_and_their_shapes_are_laid_out_alike():
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), SHAPES)
    assert lay_out(arrays) == lay_out(SHAPES)


def test_a_manifest_survives_json():
    leaves = tuple(dataclasses.replace(leaf, checksum=2**32 - 1 - i) for i, leaf in enumerate(lay_out(SHAPES)))
    manifest = Manifest(7, leaves)
    assert Manifest.from_fields(json.loads(json.dumps(manifest.to_fields()))) == manifest


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shape": (3, 5)}, "leaf ['embed'] is float32[3, 5], expected float32[5, 3]"),
        ({"dtype": "bfloat16"}, "leaf ['embed'] is bfloat16[5, 3], expected float32[5, 3]"),
        ({"offset": 4}, "leaf ['embed'] lies at 4, expected 0"),
        ({"path": "['embedding']"}, "leaf ['embed'] is missing, expected float32[5, 3]"),
    ],
)
def test_another_layout_is_refused_by_the_name_of_the_leaf(changes, sentence):
    expected = lay_out(SHAPES)
    sent = (dataclasses.replace(expected[0], **changes), *expected[1:])
    with pytest.raises(WeightsRefusedError, match=re.escape(f"weights of version 3: {sentence}")):
        check_layout(Manifest(3, sent), expected)


def test_a_leaf_too_many_is_refused():
    expected = lay_out(SHAPES)
    sent = (*expected, Leaf("['head']", (1,), "float32", 192))
    with pytest.raises(WeightsRefusedError, match=re.escape("leaf ['head'] is not part of the generator's model")):
        check_layout(Manifest(3, sent), expected)


def test_checksums_are_no_part_of_the_layout():
    expected = lay_out(SHAPES)
    check_layout(Manifest(3, tuple(dataclasses.replace(leaf, checksum=5) for leaf in expected)), expected)
