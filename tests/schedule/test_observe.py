"""Numbers of a step against hand-computed ones."""

import numpy as np

from magistral_jax.records import Graded, Reward, Rollout, Verdict
from magistral_jax.schedule.observe import FilterWatch, describe_rollouts, is_after_swap


def graded(
    versions: list[int],
    verdict: Verdict,
    *,
    parts: tuple[float, float, float, float] = (0.1, 0.9, 0.0, 0.1),
    truncated: bool = False,
) -> Graded:
    rollout = Rollout(
        request_id=0,
        prompt_ids=np.zeros(3, np.int32),
        completion_ids=np.zeros(len(versions), np.int32),
        behavior_logprob=np.zeros(len(versions), np.float32),
        weight_version=np.array(versions, np.int32),
        truncated=truncated,
    )
    return Graded(rollout, Reward(verdict, *parts, path="", seconds=0.0))


def test_means_are_over_sequences_or_over_tokens():
    groups = [
        [
            graded([3, 3, 4, 5], Verdict.CORRECT),
            graded([5], Verdict.BAD_FORMAT, parts=(0.0, 0.0, 0.0, 0.0)),
        ],
        [
            graded([4, 4, 4], Verdict.WRONG, parts=(0.1, 0.0, -0.06, 0.1), truncated=True),
            graded([5, 5], Verdict.TIMEOUT, parts=(0.1, 0.0, 0.0, 0.0)),
        ],
    ]
    found = describe_rollouts(groups, 5)
    expected = {
        "reward": (1.1 + 0.0 + 0.14 + 0.1) / 4,
        "reward_format": 0.3 / 4,
        "reward_correctness": 0.9 / 4,
        "reward_length": -0.06 / 4,
        "reward_language": 0.2 / 4,
        "pass_rate": 1 / 4,
        "format_rate": 3 / 4,
        "timeout_share": 1 / 4,
        "completion_length": 10 / 4,
        "truncated_share": 1 / 4,
        # Over the 10 tokens, not a mean of means of sequences (that would be (1.25 + 0 + 1 + 0) / 4 = 0.5625).
        "staleness": (2 + 2 + 1 + 0 + 0 + 1 + 1 + 1 + 0 + 0) / 10,
        "staleness_max": 2.0,
        # Only the two tokens after their own completion's swap; one that began late is no swap.
        "swapped_token_share": 2 / 10,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name)
    assert all(type(value) is float for value in found.values())


def test_the_first_token_is_never_after_a_swap():
    assert is_after_swap(np.array([2, 2, 3, 3, 5], np.int32)).tolist() == [False, False, True, True, True]
    assert is_after_swap(np.array([7], np.int32)).tolist() == [False]
    assert is_after_swap(np.zeros(0, np.int32)).tolist() == []


def test_many_filtered_groups_without_a_batch_are_noticed_once_and_at_twice_as_many():
    watch = FilterWatch(2)
    unrewarded = [graded([0], Verdict.WRONG, parts=(0.1, 0.0, 0.0, 0.0))] * 4
    said = {n: sentence for n in range(1, 33) if (sentence := watch.add(unrewarded))}
    assert list(said) == [8, 16, 32]
    assert said[8].startswith("8 groups in a row were filtered")
    assert "(their mean is 0.100)" in said[8]
    assert "never rewarded" in said[8]
    watch.reset()
    assert [watch.add(unrewarded) for _ in range(7)] == [None] * 7


def test_solved_problems_are_called_too_easy():
    watch = FilterWatch(1)
    sentences = [watch.add([graded([0], Verdict.CORRECT)] * 2) for _ in range(4)]
    assert sentences[3] is not None
    assert "too easy" in sentences[3]
