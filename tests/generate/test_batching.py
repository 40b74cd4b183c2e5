"""Continuous batching on a tiny model: samples that depend on nothing but their request, pages, stops, and swaps."""

import collections
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.records import MagistralError, Rollout

Rollouts = dict[int, Rollout]

# What pages and row shapes change is the order of float32 sums: 5e-6 was the largest difference seen.
TOLERANCE = 5e-5
# Another engine than the default one of conftest: fewer slots, longer blocks, and the smallest pool that is allowed.
OTHER = {"num_slots": 3, "decode_block": 5, "num_pages": 7}
# More slots than requests in the end: its blocks shrink to half their rows.
WIDE = {"num_slots": 16}
NO_STOP = (1000, 1001, 1002)  # no token has these ids: completions run to their limit


def mixed_requests(tiny: Any) -> list[GenerationRequest]:
    """Ragged prompts (1 token, one page of 4, one more, the longest), limits, temperatures and truncations."""
    lengths = [1, 4, 5, 12, 9, 8, 1, 3, 11, 2]
    return [
        tiny.request(
            100 + i,
            length,
            max_new_tokens=12 - i % 4,
            temperature=[1.0, 0.7, 0.0][i % 3],
            top_p=[1.0, 0.9][i % 2],
            top_k=[0, 0, 0, 20][i % 4],
        )
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def alone(tiny: Any) -> Rollouts:
    """Rollouts of `mixed_requests`, each made with nothing else in the engine."""
    batcher = tiny.batcher()
    return {r.request_id: tiny.finish(batcher, [r])[r.request_id] for r in mixed_requests(tiny)}


def assert_same(rollouts: Rollouts, expected: Rollouts):
    assert rollouts.keys() == expected.keys()
    for request_id, rollout in rollouts.items():
        other = expected[request_id]
        np.testing.assert_array_equal(rollout.prompt_ids, other.prompt_ids)
        np.testing.assert_array_equal(rollout.completion_ids, other.completion_ids)
        np.testing.assert_allclose(rollout.behavior_logprob, other.behavior_logprob, atol=TOLERANCE)
        assert rollout.truncated == other.truncated


def assert_all_free(batcher: ContinuousBatcher):
    assert batcher.allocator.num_free == batcher.allocator.num_pages


# ---- samples and their log-probs ----


@pytest.mark.parametrize("engine", [{}, OTHER, WIDE], ids=["default", "other", "wide"])
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_a_sample_depends_only_on_seed_request_and_position(
    tiny: Any, alone: Rollouts, engine: dict[str, int], order: str
):
    requests = mixed_requests(tiny)
    neighbours = [tiny.request(i, 1 + i % 12) for i in range(8)]
    if order == "backward":
        requests = requests[::-1]
    if order == "shuffled":
        requests = [r for pair in zip(requests, neighbours, strict=False) for r in pair] + requests[8:]
    rollouts = tiny.finish(tiny.batcher(**engine), requests)
    assert_same({i: r for i, r in rollouts.items() if i >= 100}, alone)


def test_another_seed_or_request_id_gives_other_samples(tiny: Any):
    same_prompt = [tiny.request(i, 5, prompt_seed=0) for i in range(4)]
    first = tiny.finish(tiny.batcher(stop_ids=NO_STOP), same_prompt)
    second = tiny.finish(tiny.batcher(stop_ids=NO_STOP, seed=1), same_prompt)
    completions = {tuple(r.completion_ids.tolist()) for r in (*first.values(), *second.values())}
    assert len(completions) == 8


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behavior_log_probs_are_those_that_the_trainer_computes(tiny: Any, temperature: float):
    requests = [
        tiny.request(i, length, temperature=temperature, top_p=[1.0, 0.8][i % 2], top_k=[0, 0, 10][i % 3])
        for i, length in enumerate([1, 4, 5, 12, 9, 8, 2, 11])
    ]
    rollouts = list(tiny.finish(tiny.batcher(), requests).values())
    scored = tiny.trainer_logprob(tiny.params(0), rollouts, temperature)
    for rollout, expected in zip(rollouts, scored, strict=True):
        assert rollout.behavior_logprob.dtype == np.float32
        np.testing.assert_allclose(rollout.behavior_logprob, expected, atol=TOLERANCE)


def test_greedy_takes_the_most_probable_token_each_time(tiny: Any):
    rollouts = list(tiny.finish(tiny.batcher(), [tiny.request(1, 6, temperature=0.0)]).values())
    (expected,) = tiny.trainer_logprob(tiny.params(0), rollouts)  # reported at temperature 1
    np.testing.assert_allclose(rollouts[0].behavior_logprob, expected, atol=TOLERANCE)
    again = tiny.finish(tiny.batcher(seed=9), [tiny.request(2, rollouts[0].prompt_ids, temperature=0.0)])[2]
    np.testing.assert_array_equal(again.completion_ids, rollouts[0].completion_ids)


# ---- stops and slots ----


def test_the_stop_token_stays_and_cut_completions_say_so(tiny: Any):
    stops = (0, 1, 2)
    requests = [tiny.request(i, 1 + i % 12, max_new_tokens=1 + i % 11) for i in range(100)]
    rollouts = tiny.finish(tiny.batcher(stop_ids=stops), requests)
    assert rollouts.keys() == set(range(100))
    for request in requests:
        rollout = rollouts[request.request_id]
        np.testing.assert_array_equal(rollout.prompt_ids, request.prompt_ids)
        *inner, last = rollout.completion_ids.tolist()
        assert not set(inner) & set(stops)
        assert rollout.truncated == (last not in stops)
        if rollout.truncated:
            assert len(rollout.completion_ids) == request.sampling.max_new_tokens
        assert len(rollout.completion_ids) == len(rollout.behavior_logprob) == len(rollout.weight_version)
    assert {rollout.truncated for rollout in rollouts.values()} == {True, False}
    # A stop token that comes as the very last allowed token is a stop, not a cut.
    at_limit = [r for q in requests if len((r := rollouts[q.request_id]).completion_ids) == q.sampling.max_new_tokens]
    assert {rollout.truncated for rollout in at_limit} == {True, False}


def test_batchers_with_other_stop_ids_do_not_share_them(tiny: Any):
    (free,) = tiny.finish(tiny.batcher(stop_ids=NO_STOP), [tiny.request(3, 5)]).values()
    stop = int(free.completion_ids[4])
    first = free.completion_ids.tolist().index(stop)
    with jax.no_tracing():  # stop ids are data
        (stopped,) = tiny.finish(tiny.batcher(stop_ids=(stop, 1000, 1001)), [tiny.request(3, 5)]).values()
    np.testing.assert_array_equal(stopped.completion_ids, free.completion_ids[: first + 1])
    assert not stopped.truncated
    (free_again,) = tiny.finish(tiny.batcher(stop_ids=NO_STOP), [tiny.request(3, 5)]).values()
    np.testing.assert_array_equal(free_again.completion_ids, free.completion_ids)


def test_a_slot_used_again_takes_nothing_over(tiny: Any, alone: Rollouts):
    # Every slot holds short, long, greedy and truncated requests in turn; then again, with the slots used before.
    batcher = tiny.batcher()
    tiny.finish(batcher, [tiny.request(i, 12, max_new_tokens=12, temperature=0.3, top_k=1) for i in range(9)])
    assert_same(tiny.finish(batcher, mixed_requests(tiny)), alone)
    assert_same(tiny.finish(batcher, mixed_requests(tiny)[::-1]), alone)
    assert_all_free(batcher)


# ---- prompts shared in a group, and pages ----


@pytest.mark.parametrize(
    ("length", "num_full"),
    [(1, 0), (4, 0), (5, 1), (9, 2), (11, 2)],
    ids=["one token", "one page", "one page cached", "two pages cached", "partial page cached"],
)
def test_a_group_shares_its_prompt(tiny: Any, length: int, num_full: int):
    group = [tiny.request(i, length, prompt_seed=7) for i in range(4)]
    separate = tiny.batcher(stop_ids=NO_STOP)
    expected = {r.request_id: tiny.finish(separate, [r])[r.request_id] for r in group}
    assert separate.num_prefilled == 4 * (length - 1)

    batcher = tiny.batcher(stop_ids=NO_STOP)
    for request in group:
        batcher.submit(request)
    batcher.step()
    assert batcher.num_prefilled == length - 1  # all but the token that the first decode step feeds
    owners = [batcher.allocator.num_owners(page) for page in range(batcher.allocator.num_pages)]
    pages_each = -(-(length - 1 + 3) // 4)  # as far as the first block of 3 has written
    assert (
        collections.Counter(owners)
        == collections.Counter(
            {4: num_full, 1: 4 * (pages_each - num_full), 0: len(owners) - num_full - 4 * (pages_each - num_full)}
        )
        + collections.Counter()
    )
    assert_same(tiny.finish(batcher), expected)
    assert_all_free(batcher)


def test_a_group_larger_than_the_engine_is_prefilled_once(tiny: Any):
    batcher = tiny.batcher()
    tiny.finish(batcher, [tiny.request(i, 10, prompt_seed=7) for i in range(11)])
    assert batcher.num_prefilled == 9
    assert_all_free(batcher)


@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=14),
    cancel_at=st.integers(0, 12),
)
def test_any_load_on_the_smallest_pool_completes_and_frees_all(tiny: Any, prompts: Any, cancel_at: int):
    # Prompts come again and again, interleaved: pages kept for later members must never starve the next in line.
    batcher = tiny.batcher(**OTHER)
    requests = [
        tiny.request(i, length, prompt_seed=seed, max_new_tokens=1 + (5 * i + length) % 12)
        for i, (seed, length) in enumerate(prompts)
    ]
    rollouts = tiny.finish(batcher, requests)
    assert rollouts.keys() == set(range(len(prompts)))
    assert_all_free(batcher)
    # Cancelled in the middle: all ids come back that had not ended, and all pages.
    for request in requests:
        batcher.submit(request)
    ended = [r.request_id for _ in range(cancel_at) for r in batcher.step()]
    assert sorted(ended + batcher.cancel_all()) == list(range(len(prompts)))
    assert (batcher.num_running, batcher.num_waiting) == (0, 0)
    assert_all_free(batcher)
    assert batcher.step() == []


def test_prompts_that_come_again_later_do_not_fill_the_pool(tiny: Any):
    # Three prompts of two full pages and one begun, twice over. Keeping each for its second coming would hold 9 of
    # 12 pages, and the next request, which needs 6, would wait for ever.
    requests = [tiny.request(10 * turn + i, 12, prompt_seed=i) for turn in range(2) for i in range(3)]
    batcher = tiny.batcher(**OTHER)
    assert len(tiny.finish(batcher, requests)) == 6
    assert_all_free(batcher)


def test_the_youngest_give_way_when_pages_run_out_and_lose_nothing(tiny: Any):
    requests = [tiny.request(i, length) for i, length in enumerate([9, 4, 12, 7, 1, 8])]
    roomy = tiny.batcher(stop_ids=NO_STOP)
    expected = tiny.finish(roomy, requests)
    assert roomy.num_preempted == 0
    tight = tiny.batcher(stop_ids=NO_STOP, num_pages=10)
    ended = []
    for request in requests:
        tight.submit(request)
    while len(ended) < len(requests):
        ended += tight.step()
    assert tight.num_preempted > 0
    assert tight.num_prefilled > roomy.num_prefilled  # what they had sampled was read again
    assert_same({r.request_id: r for r in ended}, expected)
    assert ended[0].request_id == 0  # the oldest never gave way
    assert_all_free(tight)


def test_a_long_prompt_is_read_in_chunks_while_others_sample(tiny: Any):
    requests = [tiny.request(0, 2), tiny.request(1, 12)]
    expected = tiny.finish(tiny.batcher(stop_ids=NO_STOP), requests)
    batcher = tiny.batcher(stop_ids=NO_STOP, prefill_chunk=4)
    batcher.submit(requests[0])
    batcher.step()
    batcher.submit(requests[1])
    progress, ended = [], {}
    for _ in range(3):
        ended |= {rollout.request_id: rollout for rollout in batcher.step()}
        progress.append((batcher.num_prefilled, batcher.num_sampled))
    # 1 token of the first prompt, then 4 + 4 + 3 of the second, and blocks of 3 all the time, the last for both.
    assert progress == [(5, 6), (9, 9), (12, 15)]
    assert_same(ended | tiny.finish(batcher), expected)
    assert_all_free(batcher)


def test_new_weights_read_a_half_read_prompt_from_its_start(tiny: Any):
    batcher = tiny.batcher(stop_ids=NO_STOP, prefill_chunk=4)
    batcher.submit(tiny.request(1, 12))
    batcher.step()
    assert (batcher.num_prefilled, batcher.num_sampled) == (4, 0)
    batcher.set_weights(tiny.params(1), 3)
    (rollout,) = tiny.finish(batcher).values()
    assert num_before(rollout) == 0
    (scored,) = tiny.trainer_logprob(tiny.params(1), [rollout])
    np.testing.assert_allclose(rollout.behavior_logprob, scored, atol=TOLERANCE)


def test_single_requests_can_be_cancelled_wherever_they_are(tiny: Any):
    requests = [tiny.request(i, 3 + i) for i in range(7)]
    expected = tiny.finish(tiny.batcher(stop_ids=NO_STOP), requests)
    batcher = tiny.batcher(stop_ids=NO_STOP, prefill_chunk=4)
    for request in requests:
        batcher.submit(request)
    batcher.step()
    # One samples, one is being read, one waits, one has never been here.
    assert sorted(batcher.cancel([0, 3, 6, 99])) == [0, 3, 6]
    assert_same(tiny.finish(batcher), {i: expected[i] for i in (1, 2, 4, 5)})
    assert_all_free(batcher)


def test_cancelled_requests_leave_nothing_behind(tiny: Any):
    batcher = tiny.batcher(stop_ids=NO_STOP)
    for request in [tiny.request(i, 12, prompt_seed=3) for i in range(6)]:
        batcher.submit(request)
    batcher.step()
    assert sorted(batcher.cancel_all()) == list(range(6))
    assert_all_free(batcher)
    expected = tiny.finish(tiny.batcher(stop_ids=NO_STOP), mixed_requests(tiny))
    assert_same(tiny.finish(batcher, mixed_requests(tiny)), expected)


# ---- weights ----


def test_the_first_rollout_needs_weights(tiny: Any):
    batcher = tiny.batcher(weights=False)
    batcher.submit(tiny.request(0, 3))
    with pytest.raises(ValueError, match="no weights yet: the first publish comes before the first rollout"):
        batcher.step()
    assert batcher.version == -1


@pytest.mark.parametrize("version", [-1, 4, 5, 6])
def test_versions_never_go_back(tiny: Any, version: int):
    batcher = tiny.batcher(weights=False)
    batcher.set_weights(tiny.params(0), 5)
    batcher.step()
    batcher.set_weights(tiny.params(1), 7)  # has not taken effect yet, and counts all the same
    with pytest.raises(ValueError, match=rf"weight version {version} after 7: versions never go back"):
        batcher.set_weights(tiny.params(0), version)
    batcher.step()
    assert batcher.version == 7
    assert batcher.params is tiny.params(1)


def swapped(tiny: Any, mode: str, new_seed: int = 1) -> ContinuousBatcher:
    """Three running requests and one that waits in vain until two blocks are done and new weights arrive."""
    batcher = tiny.batcher(stop_ids=NO_STOP, on_publish=mode, num_slots=4)
    for request in [tiny.request(i, length) for i, length in enumerate([1, 5, 12, 8])]:
        batcher.submit(request)
    # prefill_rows is 2, and a prompt of one token needs none: three or four are in after two steps.
    batcher.step()
    batcher.step()
    assert batcher.num_running == 4
    batcher.set_weights(tiny.params(new_seed), 3)
    assert batcher.has_new_weights
    batcher.submit(tiny.request(9, 6))
    return batcher


def num_before(rollout: Rollout):
    """Tokens of the old version, after a check that all of them come first."""
    count = int((rollout.weight_version == 0).sum())
    np.testing.assert_array_equal(rollout.weight_version, [0] * count + [3] * (len(rollout.weight_version) - count))
    return count


@pytest.fixture(scope="module")
def unswapped(tiny: Any) -> Rollouts:
    requests = [tiny.request(i, length) for i, length in [(0, 1), (1, 5), (2, 12), (3, 8), (9, 6)]]
    return tiny.finish(tiny.batcher(stop_ids=NO_STOP), requests)


def test_in_place_keeps_running_sequences_on_their_stale_cache(tiny: Any, unswapped: Rollouts):
    batcher = swapped(tiny, "in_place")
    rollouts = tiny.finish(batcher)
    prefilled = batcher.num_prefilled
    scored = dict(zip(rollouts, tiny.trainer_logprob(tiny.params(1), list(rollouts.values())), strict=True))
    for request_id in range(4):
        rollout, before = rollouts[request_id], num_before(rollouts[request_id])
        assert before in (3, 6)
        assert len(rollout.completion_ids) == 12
        np.testing.assert_array_equal(rollout.completion_ids[:before], unswapped[request_id].completion_ids[:before])
        np.testing.assert_allclose(
            rollout.behavior_logprob[:before], unswapped[request_id].behavior_logprob[:before], atol=TOLERANCE
        )
        # The keys and values of old weights are still read: not what the new weights alone would say.
        assert np.abs(rollout.behavior_logprob - scored[request_id])[before:].max() > 100 * TOLERANCE
    assert num_before(rollouts[9]) == 0  # admitted after the swap: all new
    np.testing.assert_allclose(rollouts[9].behavior_logprob, scored[9], atol=TOLERANCE)
    assert prefilled == 4 + 11 + 7 + 5  # each prompt once, nothing rebuilt
    assert_all_free(batcher)


def test_recompute_goes_on_as_if_all_had_been_read_by_the_new_weights(tiny: Any, unswapped: Rollouts):
    batcher = swapped(tiny, "recompute")
    rollouts = tiny.finish(batcher)
    scored = dict(zip(rollouts, tiny.trainer_logprob(tiny.params(1), list(rollouts.values())), strict=True))
    for request_id in range(4):
        rollout, before = rollouts[request_id], num_before(rollouts[request_id])
        assert before in (3, 6)
        assert len(rollout.completion_ids) == 12
        # The tokens sampled so far are kept with the log-probs that they were sampled at.
        np.testing.assert_array_equal(rollout.completion_ids[:before], unswapped[request_id].completion_ids[:before])
        np.testing.assert_allclose(
            rollout.behavior_logprob[:before], unswapped[request_id].behavior_logprob[:before], atol=TOLERANCE
        )
        np.testing.assert_allclose(rollout.behavior_logprob[before:], scored[request_id][before:], atol=TOLERANCE)
    np.testing.assert_allclose(rollouts[9].behavior_logprob, scored[9], atol=TOLERANCE)
    assert_all_free(batcher)


@pytest.mark.parametrize("mode", ["in_place", "recompute", "drain"])
def test_a_swap_to_the_same_weights_changes_no_sample(tiny: Any, unswapped: Rollouts, mode: str):
    rollouts = tiny.finish(swapped(tiny, mode, new_seed=0))
    assert_same(rollouts, unswapped)
    assert all(3 in r.weight_version or mode == "drain" for r in rollouts.values())


def test_drain_finishes_what_runs_and_admits_nothing_meanwhile(tiny: Any, unswapped: Rollouts):
    batcher = swapped(tiny, "drain")
    rollouts = {}
    while batcher.num_running:
        assert batcher.version == 0
        assert batcher.has_new_weights
        assert batcher.num_waiting == 1
        rollouts |= {r.request_id: r for r in batcher.step()}
    assert rollouts.keys() == {0, 1, 2, 3}
    assert_same(rollouts, {i: unswapped[i] for i in range(4)})
    assert all(num_before(r) == 12 for r in rollouts.values())
    late = tiny.finish(batcher)[9]
    assert batcher.version == 3
    assert num_before(late) == 0
    (scored,) = tiny.trainer_logprob(tiny.params(1), [late])
    np.testing.assert_allclose(late.behavior_logprob, scored, atol=TOLERANCE)


def test_members_admitted_after_a_swap_read_a_prompt_of_the_new_weights(tiny: Any):
    batcher = tiny.batcher(stop_ids=NO_STOP)
    for request in [tiny.request(i, 9, prompt_seed=5) for i in range(8)]:
        batcher.submit(request)
    batcher.step()
    assert (batcher.num_running, batcher.num_prefilled) == (4, 8)
    batcher.set_weights(tiny.params(1), 3)
    rollouts = tiny.finish(batcher)
    assert batcher.num_prefilled == 16  # once under each version
    late = [r for r in rollouts.values() if num_before(r) == 0]
    assert len(late) == 4
    for rollout, expected in zip(late, tiny.trainer_logprob(tiny.params(1), late), strict=True):
        np.testing.assert_allclose(rollout.behavior_logprob, expected, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["in_place", "recompute", "drain"])
def test_a_swap_recompiles_nothing_and_allocates_no_page(tiny: Any, mode: str):
    batcher = swapped(tiny, mode)
    tiny.finish(batcher)  # warm: one swap of this mode is behind us
    pool = (batcher.allocator.num_pages, 2, 4, 8)
    count = lambda: sum(array.shape == pool for array in jax.live_arrays())
    before = count()
    for request in [tiny.request(i, length) for i, length in enumerate([1, 5, 12, 8, 6])]:
        batcher.submit(request)
    with jax.no_tracing():
        batcher.step()
        batcher.set_weights(tiny.params(0), 4)
        rollouts = tiny.finish(batcher)
    assert len(rollouts) == 5
    assert batcher.version == 4
    assert count() == before  # keys and values of two layers, and of what else is alive in this process


# ---- refusals ----


def test_refusals_name_the_request_and_the_setting(tiny: Any):
    batcher = tiny.batcher()
    with pytest.raises(
        MagistralError,
        match=r"Prompt of request 7 has 13 tokens; expected 1 to 12 \(generation\.max_prompt_tokens\)\.",
    ):
        batcher.submit(tiny.request(7, 13))
    with pytest.raises(MagistralError, match="Prompt of request 8 has 0 tokens"):
        batcher.submit(tiny.request(8, 0))
    for new in (0, 13):
        with pytest.raises(
            MagistralError,
            match=rf"Request 9 asks for {new} new tokens; expected 1 to 12 \(generation\.max_new_tokens\)\.",
        ):
            batcher.submit(tiny.request(9, 3, max_new_tokens=new))
    assert batcher.num_waiting == 0


def test_a_pool_too_small_for_one_sequence_is_refused(tiny: Any):
    with pytest.raises(MagistralError, match=r"generation\.num_pages` is 6, but one sequence of 24 tokens"):
        tiny.batcher(num_pages=6)
