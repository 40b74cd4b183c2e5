"""Pools as text, and the order in which their problems come."""

import collections

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from magistral_jax.data.loader import PromptLoader
from magistral_jax.data.pool import PromptPools, from_text, in_window, known_rate, to_text
from magistral_jax.records import Problem, Prompt


def pools(sizes: list[int], mixtures: list[list[tuple[float, int]]], seed: int = 0) -> PromptPools:
    ids = np.zeros(1, np.int32)
    prompts = [Prompt(Problem(f"p{i}", "s", "a", extra={"pass_rate": i / 10}), ids, "s") for i in range(sum(sizes))]
    return PromptPools(PromptLoader(prompts, seed, [(1.0, size) for size in sizes]), mixtures, seed)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_pool_goes_through_its_text(bits: list[bool]):
    pool = np.array(bits)
    np.testing.assert_array_equal(from_text(to_text(pool), len(bits)), pool)


def test_a_window_holds_both_its_ends_and_what_is_unknown():
    rates = np.array([0.0, 0.2, 0.5, 0.8, 1.0, np.nan])
    assert in_window(rates, (0.2, 0.8)).tolist() == [False, True, True, True, False, True]


def test_the_latest_pass_rate_of_curation_is_taken():
    rate = lambda **extra: known_rate(Problem("p", "s", "a", extra=extra))
    assert rate(pass_rate_1=0.25, pass_rate_2=0.5) == 0.5
    assert rate(pass_rate_2=0.5, pass_rate=0.75) == 0.75
    assert np.isnan([rate(), rate(pass_rate=None), rate(pass_rate="high")]).all()


def test_every_epoch_has_the_pools_problems_once_and_no_others():
    source = pools([12], [[(1.0, 0)]])
    pool = np.arange(12) % 3 == 0
    order = lambda first: [
        source.place(0, to_text(pool), first_group=first, group_id=first + number) for number in range(8)
    ]
    for epoch in (order(5)[:4], order(5)[4:], order(40)[:4]):
        assert sorted(epoch) == [0, 3, 6, 9]
    assert len({tuple(order(first)) for first in (5, 40, 41)}) > 1  # each pool has an order of its own
    assert order(5) == order(5)


def test_sources_come_in_the_shares_of_the_stage_and_an_empty_one_is_left_out():
    source = pools([10, 10, 10], [[(1.0, 0)], [(0.75, 1), (0.25, 2)]])
    members = source.members(1)
    assert members.tolist() == [False] * 10 + [True] * 20
    count = lambda pool: collections.Counter(
        source.place(1, to_text(pool), first_group=0, group_id=group_id) // 10 for group_id in range(40)
    )
    assert count(members) == {1: 30, 2: 10}
    assert count(members & (np.arange(30) >= 20)) == {2: 40}
