"""Collation: every token keeps its meaning whatever the packing; longest first; few shapes."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.pytrees import Batch
from magistral_jax.records import MagistralError
from magistral_jax.train.collate import TrainingSequence, collate, pack

LENGTHS = st.lists(st.integers(2, 20), min_size=1, max_size=15)


def make_sequence(prompt: Sequence[int], completion: Sequence[int], advantage: float = 1.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    return TrainingSequence(
        prompt_ids=np.array(prompt, np.int32),
        completion_ids=np.array(completion, np.int32),
        behavior_logprob=rng.uniform(-3, -0.1, len(completion)).astype(np.float32),
        advantage=advantage,
        staleness=rng.integers(0, 4, len(completion)).astype(np.int32),
    )


def random_sequences(lengths: Sequence[int], seed: int = 0):
    rng = np.random.default_rng(seed)
    sequences = []
    for i, length in enumerate(lengths):
        num_prompt = int(rng.integers(1, length))
        ids = rng.integers(0, 100, length)
        sequences.append(
            make_sequence(ids[:num_prompt].tolist(), ids[num_prompt:].tolist(), float(rng.normal()), seed=i)
        )
    return sequences


def unpacked(batch: Batch):
    """Every segment of a batch as a TrainingSequence again, from the arrays alone."""
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, x.shape[-1]), batch)
    found = []
    for row in range(len(flat.tokens)):
        for segment in range(1, flat.segment_ids[row].max() + 1):
            at = np.flatnonzero(flat.segment_ids[row] == segment)
            np.testing.assert_array_equal(at, np.arange(at[0], at[0] + len(at)))  # contiguous
            np.testing.assert_array_equal(flat.positions[row, at], np.arange(len(at)))
            trained = at[flat.loss_mask[row, at]]
            found.append(
                TrainingSequence(
                    prompt_ids=flat.tokens[row, at[: len(at) - len(trained)]],
                    completion_ids=flat.tokens[row, trained],
                    behavior_logprob=flat.behavior_logprob[row, trained],
                    advantage=float(flat.advantage[row, trained[0]]),
                    staleness=flat.staleness[row, trained],
                )
            )
    return found


def as_key(sequence: TrainingSequence):
    return tuple(np.asarray(value).round(5).tolist() for value in dataclasses.astuple(sequence) if np.ndim(value))


def test_pack_golden():
    # Longest first: 5 opens row 0 (3 left), 4 opens row 1 (4 left), 3 goes to row 0 (full), 2 to row 1.
    # In order of arrival it would be [[0, 1], [2, 3]].
    assert pack([3, 5, 4, 2], 8) == [[1, 0], [2, 3]]


def test_longest_first_needs_fewer_rows_than_order_of_arrival():
    # Arrival: 2+2+4 | 6 | 6 | 4, four rows. Longest first: 6+2 | 6+2 | 4+4, three and no padding.
    assert len(pack([2, 2, 4, 6, 6, 4], 8)) == 3


def test_rows_of_equal_lengths_keep_their_order():
    assert pack([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, row_tokens=st.integers(20, 50))
def test_pack_equals_loop(lengths: Sequence[int], row_tokens: int):
    rows = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[index] <= row_tokens:
                row.append(index)
                break
        else:
            rows.append([index])
    assert pack(lengths, row_tokens) == rows


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, row_tokens=st.integers(20, 50))
def test_pack_loses_and_doubles_nothing(lengths: Sequence[int], row_tokens: int):
    rows = pack(lengths, row_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= row_tokens for row in rows)
    # First fit leaves no two rows that could be one.
    fill = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > row_tokens


def test_a_sequence_longer_than_a_row_is_refused_by_name():
    with pytest.raises(MagistralError, match=r"9 tokens, but batch\.row_tokens allows 8"):
        pack([3, 9], 8)
    assert pack([8], 8) == [[0]]


def test_collate_golden():
    first = make_sequence([1, 2], [3, 4], advantage=0.5)
    second = make_sequence([5], [6, 7], advantage=-1.5, seed=1)
    batch = collate([second, first], row_tokens=9, rows_per_microbatch=1)
    assert batch.tokens.tolist() == [[[1, 2, 3, 4, 5, 6, 7, 0, 0]]]
    assert batch.positions.tolist() == [[[0, 1, 2, 3, 0, 1, 2, 0, 0]]]  # bug: 4, 5, 6 in the second segment
    assert batch.segment_ids.tolist() == [[[1, 1, 1, 1, 2, 2, 2, 0, 0]]]
    # True at the token that was sampled, not at its predecessor; 4 and 7 are the stop tokens.
    mask = [[[False, False, True, True, False, True, True, False, False]]]
    assert batch.loss_mask.tolist() == mask
    assert batch.advantage.tolist() == [[[0, 0, 0.5, 0.5, 0, -1.5, -1.5, 0, 0]]]
    assert batch.loss_weight.tolist() == np.asarray(mask, np.float32).tolist()
    np.testing.assert_array_equal(batch.behavior_logprob[0, 0, 2:4], first.behavior_logprob)
    np.testing.assert_array_equal(batch.behavior_logprob[0, 0, 5:7], second.behavior_logprob)
    np.testing.assert_array_equal(batch.staleness[0, 0, 2:4], first.staleness)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, row_tokens=st.integers(20, 40), rows=st.integers(1, 4))
def test_collate_keeps_every_sequence_as_it_is(lengths: Sequence[int], row_tokens: int, rows: int):
    sequences = random_sequences(lengths)
    batch = collate(sequences, row_tokens=row_tokens, rows_per_microbatch=rows)
    assert sorted(map(as_key, unpacked(batch))) == sorted(map(as_key, sequences))
    assert batch.loss_weight.sum() == sum(len(s.completion_ids) for s in sequences)
    for name in ("loss_mask", "behavior_logprob", "advantage", "loss_weight", "staleness"):
        is_padding = np.asarray(batch.segment_ids) == 0
        assert not np.asarray(getattr(batch, name))[is_padding].any(), name


@pytest.mark.parametrize(("num_rows", "per_microbatch", "expected"), [(1, 1, 1), (3, 1, 4), (5, 2, 4), (8, 2, 4)])
def test_number_of_microbatches_is_a_power_of_two_with_the_empty_ones_last(
    num_rows: int, per_microbatch: int, expected: int
):
    batch = collate(random_sequences([10] * num_rows), row_tokens=10, rows_per_microbatch=per_microbatch)
    assert batch.tokens.shape == (expected, per_microbatch, 10)
    is_used = [bool(part.any()) for part in batch.segment_ids]
    assert is_used == sorted(is_used, reverse=True)


def test_few_shapes_over_many_batches():
    shapes = {
        collate(random_sequences([9] * n), row_tokens=10, rows_per_microbatch=1).tokens.shape for n in range(1, 33)
    }
    assert len(shapes) == 6  # 1, 2, 4, 8, 16, 32 and not 32 different ones


def test_ablation_of_the_normalization_changes_the_weights_and_nothing_else():
    sequences = random_sequences([5, 12, 7])
    by_token = collate(sequences, row_tokens=16, rows_per_microbatch=1)
    by_sequence = collate(sequences, row_tokens=16, rows_per_microbatch=1, normalization="sequence")
    for field in dataclasses.fields(by_token):
        a, b = getattr(by_token, field.name), getattr(by_sequence, field.name)
        is_equal = np.array_equal(a, b)
        assert is_equal == (field.name != "loss_weight"), field.name
    # Every completion weighs 1 in all; with "token" it weighs as many as it has tokens.
    assert float(by_sequence.loss_weight.sum()) == pytest.approx(3.0)
    lengths = sorted(len(s.completion_ids) for s in sequences)
    weights = np.asarray(by_sequence.loss_weight)[np.asarray(by_sequence.loss_mask)]
    expected = sorted(1 / n for n in lengths for _ in range(n))
    np.testing.assert_allclose(sorted(weights), expected, rtol=1e-6)


def test_no_sequences_make_one_empty_microbatch():
    batch = collate([], row_tokens=8, rows_per_microbatch=2)
    assert batch.tokens.shape == (1, 2, 8)
    assert not batch.loss_mask.any()


@pytest.mark.parametrize(("prompt", "completion"), [([], [1]), ([1], [])])
def test_an_empty_prompt_or_completion_is_refused(prompt: Sequence[int], completion: Sequence[int]):
    # The first token of a segment has no predecessor: its log-prob would come from the sequence before it in the row.
    with pytest.raises(ValueError, match="at least one prompt token"):
        collate([make_sequence(prompt, completion)], row_tokens=8, rows_per_microbatch=1)
