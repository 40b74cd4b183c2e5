"""Which right completions become traces."""

import collections

from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.data.trace_choice import Candidate, choose_traces, length_class
from magistral_jax.records import Problem


def candidate(problem: str, num_tokens: int, language: str = "en", text: str = "") -> Candidate:
    return Candidate(Problem(problem, problem, "1"), text or f"{problem} {num_tokens}", num_tokens, language)


def lengths(chosen: list[Candidate]) -> list[int]:
    return [found.num_tokens for found in chosen]


def test_equal_completions_count_once():
    twins = [candidate("a", 10, text="x  y"), candidate("a", 11, text="x y\n"), candidate("b", 12, text="x y")]
    assert lengths(choose_traces(twins, max_per_problem=9, num=0)) == [10, 12]


def test_a_problem_gives_its_limit_from_all_its_lengths():
    many = [candidate("a", length) for length in (60, 10, 50, 20, 40, 30)]
    assert lengths(choose_traces(many, max_per_problem=3, num=0)) == [60, 20, 40]
    assert lengths(choose_traces(many, max_per_problem=1, num=0)) == [40]


def test_a_length_that_is_rare_is_not_crowded_out():
    short = [candidate(f"s{i}", 20) for i in range(40)]
    long = [candidate(f"l{i}", 600) for i in range(4)]
    chosen = choose_traces([*short, *long], max_per_problem=1, num=8)
    assert collections.Counter(map(length_class, lengths(chosen))) == {4: 4, 9: 4}
    more = choose_traces([*short, *long], max_per_problem=1, num=20)
    assert collections.Counter(map(length_class, lengths(more))) == {4: 16, 9: 4}  # there are no more long ones


def test_languages_take_turns():
    found = [candidate(f"{language}{i}", 20, language) for language in ("en", "fr") for i in range(30)]
    chosen = choose_traces(found[:33], max_per_problem=1, num=6)
    assert collections.Counter(trace.language for trace in chosen) == {"en": 3, "fr": 3}


def test_a_cell_takes_one_of_each_problem_before_a_second():
    found = [candidate("a", 20), candidate("a", 21), candidate("a", 22), candidate("b", 23), candidate("c", 24)]
    assert lengths(choose_traces(found, max_per_problem=3, num=3)) == [20, 23, 24]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 99), st.sampled_from(["en", "fr"])), max_size=30),
    st.integers(1, 3),
    st.integers(0, 20),
)
@settings(max_examples=50, deadline=None)
def test_limits_hold(items: list[tuple[str, int, str]], most: int, num: int):
    found = [candidate(*item, text=str(place)) for place, item in enumerate(items)]
    chosen = choose_traces(found, max_per_problem=most, num=num)
    counts = collections.Counter(trace.problem.id for trace in chosen)
    available = sum(min(most, size) for size in collections.Counter(item[0] for item in items).values())
    assert len(chosen) == (min(num, available) if num else available)
    assert max(counts.values(), default=0) <= most
    assert [found.index(trace) for trace in chosen] == sorted(found.index(trace) for trace in chosen)
