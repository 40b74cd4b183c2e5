"""Rows dealt to data-parallel ranks: nothing lost, near equal work, and the metric that says so."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.policy.config import ModelConfig
from magistral_jax.train.balance import Ranks, deal, imbalance, ranks_of
from magistral_jax.train.collate import TrainingSequence, collate, pack


def sequences(lengths: Sequence[int]):
    rng = np.random.default_rng(0)
    return [
        TrainingSequence(
            prompt_ids=np.full(1, i, np.int32),
            completion_ids=rng.integers(0, 9, n - 1).astype(np.int32),
            behavior_logprob=np.zeros(n - 1, np.float32),
            advantage=float(i),
            staleness=np.zeros(n - 1, np.int32),
        )
        for i, n in enumerate(lengths)
    ]


def test_a_row_costs_its_tokens_and_their_pairs():
    # 3 · (1 + 0.5 · 3) + 2 · (1 + 0.5 · 2) = 7.5 + 4.
    assert Ranks(2, 0.5).cost([3, 2]) == pytest.approx(11.5)
    assert Ranks().cost([3, 2]) == 5
    # A layer of width 4 with 2 heads and 1 KV head of 2: 4 · (2·4 + 2·2 + 3·8) = 144 a layer, and 4 · 10 / 2 of the
    # head for each of the two layers: 164. Attention multiplies with keys and values of half the sequence: 4.
    model = ModelConfig(vocab_size=10, d_model=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, d_ff=8)
    assert ranks_of(model, 2) == Ranks(2, 4 / 164)


def test_deal_golden():
    # The four dearest make the first microbatch: 9 to rank 0, 8 to rank 1, then 7 joins the 8 and 6 the 9.
    costs = np.array([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0])
    assert deal(costs, 4, 2).tolist() == [0, 6, 2, 4, 7, 1, 5, 3]
    assert imbalance(costs[deal(costs, 4, 2)], 4, 2) == 0.0
    # By cost alone rank 0 would have 17 of 30 and 7 of 10, and the other would wait.
    by_cost = np.sort(costs)[::-1]
    assert imbalance(by_cost, 4, 2) == pytest.approx(1 - (15 + 5) / (17 + 7))


@settings(max_examples=40, deadline=None)
@given(
    costs=st.lists(st.floats(0, 100), min_size=1, max_size=40),
    num_ranks=st.sampled_from([1, 2, 4]),
    room=st.integers(1, 3),
)
def test_every_row_has_one_place_and_dealing_is_no_worse_than_rank_after_rank(
    costs: Sequence[float], num_ranks: int, room: int
):
    rows = num_ranks * room
    padded = np.array([*costs, *[0.0] * (-len(costs) % rows)])
    order = deal(padded, rows, num_ranks)
    assert sorted(order.tolist()) == list(range(len(padded)))
    assert imbalance(padded[order], rows, num_ranks) <= imbalance(np.sort(padded)[::-1], rows, num_ranks) + 1e-9
    # Empty rows come last, so that empty microbatches are never computed.
    totals = padded[order].reshape(-1, rows).sum(axis=1)
    assert (np.diff(totals) <= 1e-9).all() or num_ranks == 1


def test_one_rank_keeps_the_order_of_packing():
    assert deal(np.array([1.0, 3.0, 2.0]), 1, 1).tolist() == [0, 1, 2]


def test_nothing_to_do_is_no_imbalance():
    assert imbalance(np.zeros(4), 4, 2) == 0.0


def test_long_and_short_rows_are_shared_out():
    # Two long sequences and rows of short ones: as many tokens, a quarter of the pairs.
    lengths = [64, 64, *[16] * 24]
    ranks = Ranks(2, pair_cost=0.05)
    rows = pack(lengths, 64)
    costs = np.array([ranks.cost([lengths[i] for i in row]) for row in rows])
    before, after = imbalance(costs, 4, 2), imbalance(costs[deal(costs, 4, 2)], 4, 2)
    assert before > 0.15
    assert after < 0.01


def test_a_batch_for_ranks_holds_the_same_sequences_in_other_rows():
    lengths = [20, 3, 14, 9, 9, 17, 5, 20, 11, 2]
    collated = functools.partial(collate, sequences(lengths), row_tokens=20, rows_per_microbatch=4)
    plain, dealt = collated(), collated(ranks=Ranks(2, 0.1))
    assert jax.tree.map(np.shape, plain) == jax.tree.map(np.shape, dealt)
    as_rows = lambda batch: sorted(np.asarray(batch.tokens).reshape(-1, 20).tolist())
    assert as_rows(plain) == as_rows(dealt)
    for name, leaf in vars(dealt).items():
        assert np.sum(np.asarray(leaf, np.float64)) == pytest.approx(np.sum(np.asarray(getattr(plain, name), float)))
    assert not np.array_equal(plain.tokens, dealt.tokens)
