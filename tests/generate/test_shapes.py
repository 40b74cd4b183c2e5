"""Work cut into few shapes: everything is read once, nothing is compiled that is not listed, little is padding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magistral_jax.generate.shapes import PrefillShapes, decode_row_counts


def test_a_dispatch_holds_about_a_chunk():
    shapes = PrefillShapes(chunk=512, most_rows=8, longest=40_000, dispatch_tokens=32)
    assert shapes.all() == [(1, 32), (8, 32), (1, 64), (8, 64), (1, 128), (4, 128), (1, 256), (2, 256), (1, 512)]
    assert PrefillShapes(chunk=512, most_rows=8, longest=100, dispatch_tokens=32).all()[-1] == (4, 128)
    assert PrefillShapes(chunk=4, most_rows=2, longest=24, dispatch_tokens=32).all() == [(1, 4)]


def test_what_is_left_goes_together_where_that_costs_less():
    shapes = PrefillShapes(chunk=512, most_rows=8, longest=512, dispatch_tokens=32)
    four = (4, 128, [0, 1, 2, 3])  # 544 tokens' worth; a row alone 160
    assert shapes.plan([127] * 7) == [four, (1, 128, [4]), (1, 128, [5]), (1, 128, [6])]
    assert shapes.plan([127] * 8) == [four, (4, 128, [4, 5, 6, 7])]
    assert shapes.plan([20] * 4) == [(1, 32, [0]), (1, 32, [1]), (1, 32, [2]), (1, 32, [3])]  # 256 and not 288
    assert shapes.plan([20] * 5) == [(8, 32, [0, 1, 2, 3, 4])]  # 288 and not 320
    assert shapes.plan([500, 20, 512]) == [(1, 512, [0]), (1, 512, [2]), (1, 32, [1])]
    assert shapes.plan([]) == []
    costly = PrefillShapes(chunk=512, most_rows=8, longest=512, dispatch_tokens=256)
    assert costly.plan([127] * 6) == [four, (4, 128, [4, 5])]  # 768 and not 2 × 384
    assert costly.plan([127] * 5) == [four, (1, 128, [4])]


@given(
    chunk=st.integers(1, 600),
    most_rows=st.integers(1, 16),
    longest=st.integers(1, 2000),
    dispatch_tokens=st.integers(0, 1000),
    data=st.data(),
)
def test_every_chunk_is_read_once_in_a_listed_shape(
    chunk: int, most_rows: int, longest: int, dispatch_tokens: int, data: st.DataObject
):
    shapes = PrefillShapes(chunk, most_rows, longest, dispatch_tokens)
    lengths = data.draw(st.lists(st.integers(1, min(chunk, longest)), max_size=most_rows))
    plan = shapes.plan(lengths)
    assert sorted(index for _, _, indices in plan for index in indices) == list(range(len(lengths)))
    for rows, width, indices in plan:
        assert (rows, width) in shapes.all()
        assert 1 <= len(indices) <= rows
        assert all(lengths[index] <= width for index in indices)
    assert len(shapes.all()) <= 2 * len(shapes.widths)


@pytest.mark.parametrize(
    ("num_slots", "counts"),
    [(1, (1,)), (4, (4,)), (20, (10, 15, 20)), (32, (8, 16, 24, 32)), (64, (8, 16, 32, 48, 64))],
)
def test_decode_rows(num_slots: int, counts: tuple[int, ...]):
    assert decode_row_counts(num_slots) == counts
