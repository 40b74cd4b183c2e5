"""What is taken for a copy, and what is only alike."""

import pytest

from magistral_jax.data.overlap import Removal, counted, decontaminated, deduplicated
from magistral_jax.data.sources import load_problems
from magistral_jax.records import Problem

TRAIN = (
    "A train leaves the station at noon and travels 60 miles in each hour until it reaches the next town, which lies "
    "240 miles away. How many hours does it take?"
)


def problems(*statements: str) -> list[Problem]:
    return [Problem(f"p{number}", statement, "1") for number, statement in enumerate(statements)]


def ids(kept: list[Problem]) -> list[str]:
    return [problem.id for problem in kept]


# ---- evaluation problems in the training set -------------------------------------------------------------------------


def test_equal_statements_are_found_whatever_their_case_space_and_width():
    train = problems("What is  2+2?", "What is 2+3?")
    evaluation = [Problem("e", "ｗhat is 2+2?\n", "4")]  # noqa: RUF001
    kept, removed = decontaminated(train, evaluation, min_share=0.0)
    assert ids(kept) == ["p1"]
    assert removed == [Removal("p0", "in evaluation", "same statement as e")]
    assert decontaminated(train, [], min_share=0.5) == (train, [])


def test_a_statement_with_another_beginning_is_found_by_its_words():
    dressed = "Here is a puzzle about railways that my uncle told me. " + TRAIN + " Explain your steps."
    (evaluation,) = problems(TRAIN)
    kept, removed = decontaminated([Problem("dressed", dressed, "4")], [evaluation], min_share=0.5)
    assert kept == []
    assert removed == [Removal("dressed", "overlaps evaluation", "100% of p0")]
    assert decontaminated([Problem("dressed", dressed, "4")], [evaluation], min_share=0.0)[1] == []


def test_half_of_the_words_are_enough_and_a_quarter_is_not():
    (evaluation,) = problems(" ".join(f"w{i}" for i in range(47)))  # 40 sequences of 8 words
    for words, is_copy in ((27, True), (26, False), (17, False)):  # 20, 19 and 10 of them
        train = problems(" ".join(f"w{i}" for i in range(words)) + " and then something of its own")
        assert (decontaminated(train, [evaluation], min_share=0.5)[0] == []) == is_copy


def test_a_turn_of_phrase_is_no_copy():
    (evaluation,) = problems("What is the sum of all positive integers that divide 30?")  # 4 sequences
    (train,) = problems("What is the sum of all positive integers n with n * n < 50?")
    assert decontaminated([train], [evaluation], min_share=0.5)[0] == [train]


def test_chinese_is_compared_by_character():
    text = "一列火车中午从车站出发每小时行驶六十英里直到到达下一个城镇"
    (evaluation,) = problems(text)
    assert decontaminated(problems("请回答：" + text), [evaluation], min_share=0.5)[0] == []  # noqa: RUF001


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_generated_sets_are_disjoint_afterwards(seed: int):
    """Sums of two digits repeat often, so that the overlap is never empty by luck."""
    source = "reasoning-gym:chain_sum?max_terms=2&min_digits=1&max_digits=1"
    train, evaluation = load_problems(source, 300, seed), load_problems(source, 30, seed + 100)
    kept, removed = decontaminated(train, evaluation, min_share=0.5)
    assert {problem.statement for problem in kept}.isdisjoint(problem.statement for problem in evaluation)
    assert len(kept) + len(removed) == 300
    assert counted(removed).keys() == {"in evaluation"}  # other numbers make other sums


# ---- duplicates ------------------------------------------------------------------------------------------------------


def test_the_first_of_equal_statements_stays():
    kept, removed = deduplicated(problems("a b", "c", "A  b", "c"), min_similarity=0.0)
    assert ids(kept) == ["p0", "p1"]
    assert removed == [
        Removal("p2", "duplicate", "same statement as p0"),
        Removal("p3", "duplicate", "same statement as p1"),
    ]


def test_a_reworded_end_is_a_near_duplicate_and_another_number_is_not():
    reworded = TRAIN.replace("does it take", "will it take")
    other_number = TRAIN.replace("240", "300")
    statements = problems(TRAIN, reworded, other_number, "Something else entirely, of a few words and no trains.")
    kept, removed = deduplicated(statements, min_similarity=0.7)
    assert ids(kept) == ["p0", "p2", "p3"]
    (found,) = removed
    assert (found.id, found.reason) == ("p1", "near duplicate")
    # 32 words make 29 sequences of four; one changed word, the third from the end, is in 3 of them: 26 / 32.
    assert found.detail == "81% like p0"
    assert ids(deduplicated(statements, min_similarity=0.0)[0]) == ["p0", "p1", "p2", "p3"]
