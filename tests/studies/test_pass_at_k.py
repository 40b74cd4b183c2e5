"""pass@k and maj@k against counting by hand and by enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.records import MagistralError, Reward, Verdict
from magistral_jax.studies.pass_at_k import Sample, bootstrap_interval, maj_at_k, pass_at_k, summarize


def score(correct: list[bool], k: int) -> float:
    return float(pass_at_k(np.array([sum(correct)]), np.array([len(correct)]), k)[0])


def test_pass_at_k_by_hand():
    # 2 of 4 correct: 6 pairs, one of them both wrong.
    assert score([True, True, False, False], 2) == pytest.approx(5 / 6)  # 1 - (1 - 1/2)² = 3/4 would be biased
    assert score([True, False, False, False], 1) == pytest.approx(1 / 4)
    assert score([False] * 4, 4) == 0.0
    assert score([True] + [False] * 3, 4) == 1.0


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_pass_at_k_equals_enumeration_of_subsets(correct: list[bool], data: st.DataObject):
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(itertools.combinations(correct, k))
    assert score(correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_stable_where_binomials_overflow():
    n, c, k = 4000, 3, 2000
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)  # big integers; float(C(4000, 2000)) is inf
    assert float(pass_at_k(np.array([c]), np.array([n]), k)[0]) == pytest.approx(exact, rel=1e-9)


def test_pass_at_k_handles_problems_with_unequal_samples():
    values = pass_at_k(np.array([1, 1, 0]), np.array([2, 4, 3]), 2)
    np.testing.assert_allclose(values, [1.0, 1 / 2, 0.0])


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_refuses_more_samples_than_there_are(k: int):
    with pytest.raises(ValueError, match="samples of a problem"):
        pass_at_k(np.array([1, 1]), np.array([4, 2]), k)


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        (["7", "8", "7"], [True, False, True], 3, 1.0),
        (["7", "8", "8"], [True, False, False], 3, 0.0),
        (["7", "8", "8"], [True, False, False], 2, 0.5),  # a tie of the first two
        (["7", "8", "9"], [True, False, False], 3, 1 / 3),
        ([None, None, "7"], [False, False, True], 3, 1.0),  # no answer is no vote; None would win 2 to 1
        ([None, None, "7"], [False, False, True], 2, 0.0),
        (["7", "7", "8"], [False, True, False], 3, 1.0),  # one sample lost its verdict to the format
        (["7"], [True], 8, 1.0),
        ([], [], 8, 0.0),
    ],
)
def test_maj_at_k_by_hand(answers: list[str | None], correct: list[bool], k: int, expected: float):
    assert maj_at_k(answers, correct, k) == pytest.approx(expected)


@given(st.lists(st.sampled_from(["1", "2", "3", None]), max_size=9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_maj_at_k_equals_a_vote_with_random_ties(answers: list[str | None], k: int):
    correct = [answer == "2" for answer in answers]
    counts = {a: answers[:k].count(a) for a in ("1", "2", "3")}
    winners = [a for a in counts if counts[a] == max(counts.values()) > 0]
    expected = (winners.count("2") / len(winners)) if winners else 0.0
    assert maj_at_k(answers, correct, k) == pytest.approx(expected)


def test_bootstrap_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        scores = rng.beta(0.6, 0.9, size=60)  # mean 0.4, problem by problem very different
        low, high = bootstrap_interval(scores, num_resamples=400, seed=seed)
        covered += low <= 0.4 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_is_clustered_by_problem_and_a_function_of_its_seed():
    scores = np.repeat([0.0, 1.0], 10)
    low, high = bootstrap_interval(scores)
    # 20 problems that differ by nature: ±1.96·0.5/√20 = ±0.22, however many samples each has.
    assert 0.2 < low < 0.35
    assert 0.65 < high < 0.8
    assert bootstrap_interval(scores, seed=1) == bootstrap_interval(scores, seed=1)
    assert bootstrap_interval(scores, seed=1) != bootstrap_interval(np.roll(scores, 1) * 0.9, seed=1)


def test_a_perfect_or_hopeless_score_keeps_its_doubt():
    assert bootstrap_interval(np.zeros(20)) == (0.0, pytest.approx(0.161, abs=1e-3))  # Wilson; resampling gives (0, 0)
    assert bootstrap_interval(np.ones(20)) == (pytest.approx(0.839, abs=1e-3), 1.0)
    assert bootstrap_interval(np.full(5, 0.5)) == (0.5, 0.5)


def sample(verdict: Verdict, answer: str | None, *, tokens: int = 10, language: float = 0.1) -> Sample:
    correctness = 0.9 if verdict is Verdict.CORRECT else 0.0
    reward = Reward(
        verdict=verdict, format=0.1, correctness=correctness, length=0.0, language=language, path="", seconds=0.0
    )
    return Sample(answer, reward, tokens, truncated=tokens > 15)


def test_summary_of_two_problems():
    right, wrong = sample(Verdict.CORRECT, "1"), sample(Verdict.WRONG, "2", tokens=20, language=0.0)
    formless, broken = sample(Verdict.BAD_FORMAT, None), sample(Verdict.SANDBOX_ERROR, None, tokens=1000)
    summary = summarize([[right, wrong, right, broken], [wrong, formless, wrong], [broken]], maj_k=8)
    entries = summary.to_dict()
    assert entries["pass_at_1"] == pytest.approx((2 / 3 + 0) / 2)  # a sandbox error as wrong would give 1/4
    assert entries["pass_at_k"] == {"1": pytest.approx(1 / 3), "2": pytest.approx(1 / 2)}
    assert entries["maj_at_8"] == pytest.approx(1 / 2)
    assert (entries["num_problems"], entries["num_samples"], entries["num_ungraded"]) == (2, 6, 2)
    assert entries["mean_completion_length"] == pytest.approx((3 * 10 + 3 * 20) / 6)
    assert entries["format_rate"] == pytest.approx(5 / 6)
    assert entries["truncated_share"] == pytest.approx(1 / 2)
    assert entries["language_consistent_share"] == pytest.approx(1 / 2)
    assert set(entries["intervals"]) == {"pass_at_1", "pass_at_2", "maj_at_8"}
    low, high = entries["intervals"]["pass_at_1"]
    assert low <= entries["pass_at_1"] <= high


def test_summary_without_any_graded_sample_is_refused():
    with pytest.raises(MagistralError, match="failed on each of the 1 completions"):
        summarize([[sample(Verdict.SANDBOX_ERROR, None)]], maj_k=8)
