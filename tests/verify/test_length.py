import pytest
from hypothesis import given
from hypothesis import strategies as st

from magistral_jax.verify.length import length_reward


def penalty(num_tokens: int, length_cache: int = 20) -> float:
    return length_reward(num_tokens, max_length=100, length_cache=length_cache, penalty=0.1)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    # l_max 100, l_cache 20: free up to 80; 85 is a quarter of the way, 90 half; a bug that starts at l_max gives 0.
    [(0, 0.0), (79, 0.0), (80, 0.0), (85, -0.025), (90, -0.05), (100, -0.1), (101, -0.1), (10_000, -0.1)],
)
def test_the_three_pieces_of_equation_1(num_tokens: int, expected: float):
    assert penalty(num_tokens) == pytest.approx(expected)


def test_no_cache_switches_the_penalty_off():
    assert penalty(10_000, length_cache=0) == 0.0


@given(st.integers(0, 200), st.integers(1, 100))
def test_longer_is_never_better(num_tokens: int, length_cache: int):
    assert (
        -0.1
        <= penalty(num_tokens + 1, length_cache=length_cache)
        <= penalty(num_tokens, length_cache=length_cache)
        <= 0
    )
